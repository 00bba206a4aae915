"""Signatures of versions: written by `olora-ray registry sign`, checked by it and by the format's own command."""

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec

from olora_ray.tracking import checksums
from olora_ray.tracking.aliases import Aliases
from pipelines import registry
from tests.ran import ran
from tests.refused import refused

pytest.importorskip("model_signing")

Add = Callable[[str], tuple[str, str]]


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return make_keys(tmp_path / "ours")


def make_keys(place: Path) -> tuple[Path, Path]:
    """Write a private and a public key in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = place.with_suffix(".pem"), place.with_suffix(".pub")
    private.write_bytes(
        key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())
    )
    public.write_bytes(
        key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


def test_a_signed_version_is_checked_here_and_on_a_server_without_this_project(
    add: Add,
    keys: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (private, public), (uri, number) = keys, add("signed")
    at = ["--tracking-uri", uri, "--key"]
    with refused("model.sig"):
        registry.main(["verify", "signed", number, *at, str(public)])
    monkeypatch.setenv("SIGNING_KEY", private.read_text())
    registry.main(["sign", "signed", number, *at, "env:SIGNING_KEY"])
    registry.main(["verify", "signed", number, *at, f"file:{public}"])
    assert (
        f"version {number}: all 16 files are as signed by the key of file:{public}"
        in capsys.readouterr().out
    )
    _, other = make_keys(tmp_path / "other")
    with refused("the signature is not valid for"):
        registry.main(["verify", "signed", number, *at, str(other)])
    promote = ["promote", "signed", number, *at[:2], "--verify"]
    with refused("the signature is not valid for"):
        registry.main([*promote, str(other)])
    registry.main([*promote, str(public)])
    aliases = Aliases(uri, "signed")

    folder = tmp_path / "downloaded"
    shutil.copytree(aliases.files_uri(number).removeprefix("file://"), folder)
    (folder / "registered_model_meta").write_text("MLflow adds it when it downloads a version")
    assert "succeeded" in elsewhere(folder, public, code=0)
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert re.search(
        r"Hash mismatch for \W*model/model\.safetensors", elsewhere(folder, public, code=1)
    )


def elsewhere(folder: Path, public: Path, code: int) -> str:
    """Run the command of the package model-signing, without a network: its proxy is closed."""
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(folder)]
    environment = {
        **os.environ,
        "https_proxy": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
    }
    words = [*command, "--signature", str(folder / "model.sig"), "--public_key", str(public)]
    done = ran(words, code=code, env=environment)
    return done.stdout + done.stderr


def test_the_signature_of_another_version_and_a_changed_file_are_refused(
    add: Add, keys: tuple[Path, Path]
) -> None:
    (private, public), (uri, first), (_, second) = keys, add("swapped"), add("swapped")
    aliases = Aliases(uri, "swapped")
    for number in (first, second):
        aliases.sign(number, str(private))
    ours, theirs = (
        Path(aliases.files_uri(number).removeprefix("file://")) for number in (first, second)
    )
    kept = (ours / "model.sig").read_bytes()
    shutil.copyfile(theirs / "model.sig", ours / "model.sig")
    signed = Aliases(uri, "swapped", str(public))
    with refused("the signature is not valid for"):
        signed.verify(first)
    (ours / "model.sig").write_bytes(kept)
    assert signed.verify(first) == 16
    (ours / "requirements.txt").write_text("evil==1\n")
    with refused("requirements.txt was changed after the registration"):
        signed.verify(first)


@pytest.mark.parametrize("public", [False, True])
def test_a_key_that_cannot_sign_is_refused_before_a_training(
    public: bool, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    file = tmp_path / "wrong.pem"
    file.write_text(keys[1].read_text() if public else "no key")
    with refused("wrong.pem"):
        checksums.check_key(f"file:{file}")
    checksums.check_key(f"file:{keys[0]}")
