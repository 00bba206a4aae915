"""Checksums of a version's files: written at registration, checked before a promotion and when a model is loaded.

`checksums.json` lies beside the MLmodel, with size and SHA-256 of every file of the logged model. Its own SHA-256 is a
tag of the version, so it is stored in MLflow's database and not beside the files. The list is exact: an added file is
refused like a changed one, because transformers reads files such as adapter_config.json or chat_template.jinja on its
own wherever it finds them.

Whoever may write a version's files may often write its tags, too. So a verdict is bound to the digest at that time (tag
JUDGED), and a public key (registry.verify, or the environment variable VERIFY) makes a signature by its private key a
condition of every use.
"""

import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from olora_ray.common import records, storage
from olora_ray.common.errors import UserError, as_user_error, first_line
from olora_ray.common.secrets import looked_up, mask
from olora_ray.common.storage import size_and_digest
from olora_ray.tracking.client import refused
from olora_ray.tracking.moved_storage import advice

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

logger = logging.getLogger(__name__)

# Tag of a version: the folder of the run that made it.
RUN = "olora.run_folder"
# Tags of a version: its base model, of the hub with the commit, and the time of the training's workers.
BASE = "olora.base"
CPU_SECONDS = "olora.cpu_seconds"
GPU_SECONDS = "olora.gpu_seconds"
# Tag of a version: digest of its training settings. If a run is resumed with more steps, each length has its own
# version.
SETTINGS = "olora.settings_digest"

# Tag of a version: passed, refused, promoted or rolled back, with the reason.
GATE = "olora.gate"
ROLLED_BACK = "rolled back"
# Tag of a version: the version that it had to beat when the gate decided; empty if there was none.
AGAINST = "olora.gate_against"
# Tag of a version: digest of the rows that were held out from its training.
HELD_OUT = "olora.held_out_digest"
# Tag of a version, and its value for one that needs its base model.
EXPORT = "olora.export"
ADAPTER_ONLY = "adapter only"
# Tag of a version: digest of its checksums.json.
TAG = "olora.checksums"
# Tag of a version: that digest when the verdict was written.
JUDGED = "olora.judged"
# Environment variable: the public key for all processes without a config, such as vLLM's.
VERIFY = "OLORA_VERIFY"

# A version of a registered model, as the rest of the project sees it.


def name_filter(name: str) -> str:
    """Return MLflow's filter for the versions of a model; raise UserError for a name that MLflow cannot have."""
    if not name.strip() or "/" in name or ":" in name or ("'" in name and '"' in name):
        raise UserError(
            f"{name!r} cannot be the name of a registered model: remove '/', ':', or one type of quotes"
        )
    return f'name = "{name}"' if "'" in name else f"name = '{name}'"


@dataclass(frozen=True)
class Version:
    """One version, with its tags at the time of reading."""

    name: str
    """Name of the registered model."""
    number: str
    tags: Mapping[str, str]
    run_id: str | None = None  # the MLflow run that registered it
    created: float = 0.0
    """Seconds since 1970."""
    key: str = ""
    """The public key (PEM) by whose private key the version must be signed; empty: no signature is needed."""

    @property
    def folder(self) -> str:
        """The run folder of its run; empty if another program registered it."""
        return self.tags.get(RUN, "")

    @property
    def base(self) -> str:
        """Name of its base model, with the commit; empty in versions of older releases."""
        return self.tags.get(BASE, "")

    @property
    def losses(self) -> str:
        """The held-out loss before > after its training; empty if none was measured."""
        after = self.tags.get("olora.eval_loss", "")
        before = self.tags.get("olora.eval_loss_before", "")  # not in versions of older releases
        return " > ".join(f"{float(loss):.4f}" for loss in (before, after) if loss)

    @property
    def verdict(self) -> str:
        """The decision of the gate or of a person, with its reason; empty if there is none."""
        return self.tags.get(GATE, "")

    @property
    def rolled_back(self) -> bool:
        return self.verdict.startswith(ROLLED_BACK)

    @property
    def accepted(self) -> bool:
        """True if the gate or a person made it the champion, and it was not rolled back."""
        return bool(self.verdict) and not self.verdict.startswith(("refused", ROLLED_BACK))

    @property
    def checksum(self) -> str:
        """Digest of the version's checksums; empty if another program registered it."""
        return self.tags.get(TAG, "")

    @property
    def judged(self) -> str:
        """Digest of the checksums that the verdict is about; empty before a verdict, and in older releases."""
        return self.tags.get(JUDGED, "")

    def refuse_changed(self, judged: str | None = None) -> None:
        """Raise UserError if its checksums have another digest than `judged`; None: than at its verdict."""
        if judged is None:
            judged = self.judged
        if judged not in ("", self.checksum):
            raise UserError(
                f"{_name(self)} was changed after its verdict ({self.verdict or 'just now'}): {FILE} had the digest"
                f" {judged[:16]}, and now {self.checksum[:16] or 'none'}; find out who did it, restore the files or"
                " register the model again, and promote another version if this one is in use"
            )

    @property
    def adapter_only(self) -> bool:
        return self.tags.get(EXPORT) == ADAPTER_ONLY

    @classmethod
    def of(cls, version: "ModelVersion", key: str | None = None) -> "Version":
        """Return MLflow's version; `key` None: that of the environment."""
        seconds = (version.creation_timestamp or 0) / 1000
        tags = dict(version.tags)
        return cls(version.name, str(version.version), tags, version.run_id, seconds, needed(key))


def needed(key: str | None) -> str:
    """Return the public key that versions must be signed by; None: that of the environment, or none."""
    if key is None:
        return os.environ.get(VERIFY, "")
    return key


def origin_tags(folder: str, base: str, used: Mapping[str, float]) -> dict[str, str]:
    """Return the tags that say what made a version: its run folder, its base model, and the resource seconds."""
    return {
        RUN: folder,
        BASE: mask(base),
        CPU_SECONDS: f"{used.get('CPU', 0.0):.0f}",
        GPU_SECONDS: f"{used.get('GPU', 0.0):.0f}",
    }


FILE = "checksums.json"
# MLflow itself adds these beside the MLmodel when it loads a version. No model is read from them.
FROM_MLFLOW = frozenset({"registered_model_meta"})
# The signature of the version, written after its checksums.
SIGNATURE = "model.sig"
# Tag of a version: the key, as it was named, that has signed it. For people: it proves nothing.
SIGNED = "olora.signed_by"

# Name of each file of a version -> {bytes, sha256}.
Files = Mapping[str, Mapping[str, Any]]


def of_folders(folders: dict[str, Path]) -> str:
    """Return the text of checksums.json; `folders` maps a path in the model ("" for its root) to a local folder."""
    files = {}
    for path, folder in folders.items():
        for file in folder.rglob("*"):
            if file.is_file():
                name = f"{path}/{file.relative_to(folder)}".lstrip("/")
                files[name] = size_and_digest(file)
    return json.dumps({"files": files}, indent=1, sort_keys=True) + "\n"


def read_checksums(version: Version, place: str, tracking_uri: str) -> Files:
    """Return the checksums of a version; `place`, a URI or a local folder, holds its files.

    Raises UserError if the version has no checksums, or if they changed since its registration or its verdict.
    """
    version.refuse_changed()
    if not version.checksum:
        raise UserError(
            f"{_name(version)} has no checksums (tag {TAG}), because another program registered it; register it with"
            " this project before promoting it"
        )
    with tempfile.TemporaryDirectory(prefix="olora-") as folder:
        content = _local(FILE, version, place, tracking_uri, Path(folder)).read_bytes()
    if storage.digest_bytes(content) != version.checksum:
        raise UserError(
            f"{_name(version)}: {FILE} was changed after the registration; register the model again"
        )
    files = (records.parsed(content, dict[str, dict[str, dict[str, Any]]]) or {}).get("files")
    if files is None or not all(
        each.keys() == {"bytes", "sha256"} and _inside(name) for name, each in files.items()
    ):
        raise UserError(f"{_name(version)}: {FILE} is not a list of files with bytes and sha256")
    return files


def verify(version: Version, place: str, tracking_uri: str) -> int:
    """Check that a version has exactly the files of its registration, and its signature if it needs one.

    Returns the number of files. Reads all, one at a time. Raises UserError that names the first added, missing or
    changed file, and for a signature that is missing, of another key, or of other files.
    """
    files = read_checksums(version, place, tracking_uri)
    known = files.keys() | {FILE, SIGNATURE} | FROM_MLFLOW
    _refuse_added(version, _listed(version, place, tracking_uri), known)
    for name, wanted in files.items():
        with tempfile.TemporaryDirectory(prefix="olora-") as folder:
            file = _local(name, version, place, tracking_uri, Path(folder))
            if size_and_digest(file) != wanted:
                raise UserError(
                    f"{_name(version)}: {name} was changed after the registration; register the model again"
                )
    if version.key:
        _verify_signature(version, place, tracking_uri)
    if version.verdict and not version.judged:
        logger.info(
            f"{_name(version)}: an older release wrote its verdict, without a digest: a change of files and tags since"
            " would not be noticed"
        )
    return len(files)


def verify_copy(version: Version, place: str, tracking_uri: str, folder: Path) -> None:
    """Check that `folder` is an unchanged copy of the version's merged model; raise UserError as `verify`."""
    inner = "model/"
    listed = read_checksums(version, place, tracking_uri).items()
    files = {name.removeprefix(inner): wanted for name, wanted in listed if name.startswith(inner)}
    _refuse_added(version, _below(folder), files)
    for name, wanted in files.items():
        if not (folder / name).is_file() or size_and_digest(folder / name) != wanted:
            raise UserError(
                f"{_name(version)}: {folder / name} is not the registered file; delete its folder"
            )
    if version.key:
        _verify_signature(version, place, tracking_uri)


def _refuse_added(version: Version, present: Iterable[str], known: Iterable[str]) -> None:
    added = sorted(set(present) - set(known))
    if added:
        raise UserError(
            f"{_name(version)}: {added[0]} was added after the registration; remove it, or register the model again"
        )


def _listed(version: Version, place: str, tracking_uri: str) -> list[str]:
    from mlflow.artifacts import list_artifacts

    root = _root(place)
    if root is not None:
        return _below(root)
    files = []
    folders = [""]
    with refused(f"{_name(version)}: its files at {place} cannot be listed"):
        while folders:
            folder = folders.pop()
            address = f"{place.rstrip('/')}/{folder}".rstrip("/")
            for item in list_artifacts(artifact_uri=address, tracking_uri=tracking_uri):
                name = f"{folder}/{item.path.rstrip('/').rpartition('/')[2]}".lstrip("/")
                if item.is_dir:
                    folders.append(name)
                else:
                    files.append(name)
    return files


def _below(root: Path) -> list[str]:
    # Links to folders count as files, because their content is not listed.
    return [
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_symlink() or not path.is_dir()
    ]


def _local(name: str, version: Version, place: str, tracking_uri: str, folder: Path) -> Path:
    from mlflow.artifacts import download_artifacts

    root = _root(place)
    if root is not None:
        file = root / name
    else:
        source = f"{place.rstrip('/')}/{name}"
        with refused(f"{_name(version)}: {name} cannot be read"):
            file = Path(download_artifacts(source, dst_path=str(folder), tracking_uri=tracking_uri))
    if not file.is_file():
        raise UserError(
            f"{_name(version)}: {name} is missing at {place}{advice(place, tracking_uri)}"
        )
    return file


def _root(place: str) -> Path | None:
    root = Path(place.removeprefix("file://"))
    return root if root.is_absolute() else None


def _inside(name: str) -> bool:
    return bool(name) and not name.startswith("/") and ".." not in name.split("/")


def _name(version: Version) -> str:
    return f"{version.name} version {version.number}"


# Signatures of versions by a key of the user's, in the format of OpenSSF's model signing (sigstore bundles). They name
# the SHA-256 of every file, so a server without this project and without a network can check a downloaded version:
#
#     model_signing verify key FOLDER --signature FOLDER/model.sig --public_key KEY.pub
#
# The package model-signing is an extra: it brings sigstore, which only its keyless signatures need.


def sign(version: Version, place: str, tracking_uri: str, key: str) -> None:
    """Sign the checksums of a version; `key` is the path of a private EC key (PEM), file:/PATH or env:NAME.

    Does not read the other files again. Raises UserError for a key that cannot sign.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    with tempfile.TemporaryDirectory(prefix="olora-") as folder:
        signer = _signer(key, folder).set_hashing_config(_known(version, place, tracking_uri))
        signer.sign(f"{version.name}-{version.number}", Path(folder) / SIGNATURE)
        repository = get_artifact_repository(place, tracking_uri=tracking_uri)
        repository.log_artifact(f"{folder}/{SIGNATURE}")


def _verify_signature(version: Version, place: str, tracking_uri: str) -> None:
    key = version.key
    with tempfile.TemporaryDirectory(prefix="olora-") as folder:
        signature = _local(SIGNATURE, version, place, tracking_uri, Path(folder))
        # The package raises what its parts raise: ValueError, InvalidSignature, KeyError, ...
        subject = f"{_name(version)}: the signature is not valid for {key}"
        with as_user_error(
            subject, Exception, reason=lambda error: first_line(error).partition(": [")[0]
        ):
            config = _package().verifying.Config()
            config.use_elliptic_key_verifier(public_key=_pem(key, folder))
            config.set_hashing_config(_known(version, place, tracking_uri))
            config.verify(folder, signature)


def check_key(key: str) -> None:
    """Raise UserError if `key` cannot sign: before a training, rather than after it."""
    with tempfile.TemporaryDirectory(prefix="olora-") as folder:
        _signer(key, folder)


def _signer(key: str, folder: str) -> Any:
    signing = _package().signing
    pem = _pem(key, folder)
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
    with as_user_error(
        "signatures need a package, pip install 'olora-ray[sign]'", ModuleNotFoundError
    ):
        import model_signing
    return model_signing


def _known(version: Version, place: str, tracking_uri: str) -> Any:
    """Return a hashing config that takes the digests of a version's checksums, instead of reading all files."""
    from model_signing import hashing, manifest
    from model_signing._hashing.hashing import Digest

    files = read_checksums(version, place, tracking_uri)
    digests = {name: each["sha256"] for name, each in files.items()} | {FILE: version.checksum}
    items = [
        manifest.FileManifestItem(
            path=PurePosixPath(name), digest=Digest("sha256", bytes.fromhex(text))
        )
        for name, text in digests.items()
    ]
    ignored = sorted({SIGNATURE, *FROM_MLFLOW})  # verifiers read this list from the signature
    by_file = {
        "method": "files",
        "hash_type": "sha256",
        "allow_symlinks": False,
        "ignore_paths": ignored,
    }
    made = manifest.Manifest(version.name, items, manifest.SerializationType.from_args(by_file))
    config: Any = hashing.Config()
    config.hash = lambda *_, **__: made
    return config
