"""Signatures of versions by a key of the user's, in the format of OpenSSF's model signing (sigstore bundles).

The signature lies beside the MLmodel as model.sig. It names the SHA-256 of every file of the version, so a server
without this project and without a network can check a downloaded version:

    model_signing verify key FOLDER --signature FOLDER/model.sig --public_key KEY.pub

The package model-signing is an extra: it brings sigstore, which only its keyless signatures need.
"""

import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from olora_ray.common.errors import UserError, as_user_error, first_line
from olora_ray.common.secrets import looked_up
from olora_ray.tracking import checksums
from olora_ray.tracking.aliases import Aliases
from olora_ray.tracking.checksums import FILE, FROM_MLFLOW, SIGNATURE
from olora_ray.tracking.client import reachable

# Tag of a version: the key, as it was named, that has signed it.
SIGNED = "olora.signed_by"


def sign(aliases: Aliases, number: str, key: str) -> None:
    """Sign the checksums of a version; `key` is the path of a private EC key (PEM), file:/PATH or env:NAME.

    Does not read the version's files again: `Aliases.verify` does. Raises UserError for a key that cannot sign.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    with tempfile.TemporaryDirectory(prefix="olora-") as folder:
        signer = _signer(key, folder).set_hashing_config(_known(aliases, number))
        signer.sign(f"{aliases.name}-{number}", Path(folder) / SIGNATURE)
        with reachable(aliases.uri, upload=True):
            files = get_artifact_repository(aliases.files_uri(number), tracking_uri=aliases.uri)
            files.log_artifact(f"{folder}/{SIGNATURE}")
            aliases.client.set_model_version_tag(aliases.name, number, SIGNED, key)  # for people; proves nothing


def verify(aliases: Aliases, number: str, key: str) -> int:
    """Check files and signature of a version by a public key (PEM); return the number of signed files.

    Raises UserError for a changed file, and for a signature that is missing, of another key, or of other files.
    """
    count, version, place = aliases.verify(number), aliases.version(number), aliases.files_uri(number)
    with tempfile.TemporaryDirectory(prefix="olora-") as folder, reachable(aliases.uri, upload=True):
        signature = checksums.local(SIGNATURE, version, place, aliases.uri, Path(folder))
        # The package raises what its parts raise: ValueError, InvalidSignature, KeyError, ...
        subject = f"{aliases.name} version {number}: the signature is not valid for {key}"
        with as_user_error(subject, Exception, reason=lambda error: first_line(error).partition(": [")[0]):
            config = _package().verifying.Config().use_elliptic_key_verifier(public_key=_pem(key, folder))
            config.set_hashing_config(_known(aliases, number)).verify(folder, signature)
    return count


def check_key(key: str) -> None:
    """Raise UserError if `key` cannot sign: before a training, rather than after it."""
    with tempfile.TemporaryDirectory(prefix="olora-") as folder:
        _signer(key, folder)


def _signer(key: str, folder: str) -> Any:
    signing, pem = _package().signing, _pem(key, folder)
    wanted = f"{key}: expected a private EC key in PEM, without a password (openssl ecparam -name prime256v1 -genkey)"
    with as_user_error(wanted, Exception):
        return signing.Config().use_elliptic_key_signer(private_key=pem)


def _pem(key: str, folder: str) -> Path:
    if not key.startswith("env:"):
        return Path(key.removeprefix("file:")).expanduser()
    path = Path(folder) / "key.pem"  # in a folder that only this user can read
    path.write_text(looked_up(key, "the key"), encoding="utf-8")
    return path


def _package() -> Any:
    try:
        import model_signing
    except ModuleNotFoundError:
        raise UserError("signatures need the package model-signing: pip install 'olora-ray[sign]'") from None
    return model_signing


def _known(aliases: Aliases, number: str) -> Any:
    """Return a hashing config that takes the digests of a version's checksums, instead of reading all files."""
    from model_signing import hashing, manifest
    from model_signing._hashing.hashing import Digest

    version = aliases.version(number)
    with reachable(aliases.uri, upload=True):
        files = checksums.read_checksums(version, aliases.files_uri(number), aliases.uri)
    digests = {name: each["sha256"] for name, each in files.items()} | {FILE: version.checksum}
    items = [
        manifest.FileManifestItem(path=PurePosixPath(name), digest=Digest("sha256", bytes.fromhex(text)))
        for name, text in digests.items()
    ]
    ignored = sorted({SIGNATURE, *FROM_MLFLOW})  # verifiers read this list from the signature
    by_file = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": ignored}
    made = manifest.Manifest(aliases.name, items, manifest.SerializationType.from_args(by_file))
    config: Any = hashing.Config()
    config.hash = lambda *_, **__: made
    return config
