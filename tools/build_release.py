"""Builds a release: wheel and source distribution of the last commit, which have the same bytes at each build.

    .venv/bin/python tools/build_release.py [FOLDER]          (make dist; default: dist)

Then, in a new environment, `pip install FOLDER/*.whl` is what users will get. Uploading is the workflow's work
(.github/workflows/release.yml), once a tag is pushed.
"""

import gzip
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(argv: Sequence[str]) -> int:
    folder = Path(argv[0] if argv else "dist").absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    seconds = int(told("git", "log", "-1", "--format=%ct"))
    with tempfile.TemporaryDirectory() as scratch:
        # Not the working tree: setuptools would take what lies there beside the commit.
        archive = io.BytesIO(
            subprocess.run(
                ("git", "archive", "HEAD"), cwd=ROOT, check=True, capture_output=True
            ).stdout
        )
        with tarfile.open(fileobj=archive) as files:
            files.extractall(scratch, filter="data")
        environment = {**os.environ, "SOURCE_DATE_EPOCH": str(seconds)}
        words = (sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder))
        subprocess.run(words, cwd=scratch, env=environment, check=True, stdout=subprocess.DEVNULL)
    for file in folder.glob("*.tar.gz"):
        same_each_time(file, seconds)
    subprocess.run(
        (sys.executable, "-m", "twine", "check", "--strict", *map(str, folder.iterdir())),
        check=True,
    )
    return 0


def same_each_time(file: Path, seconds: int) -> None:
    """Write a source distribution again, without the times and the user of its build."""
    with tarfile.open(file) as built:
        found = {member.name: (member, built.extractfile(member)) for member in built}
        raw = io.BytesIO()
        with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as written:
            for _, (member, content) in sorted(found.items()):
                member.mtime, member.uid, member.gid, member.uname, member.gname = (
                    seconds,
                    0,
                    0,
                    "",
                    "",
                )
                member.pax_headers = {}
                written.addfile(member, content)
    with file.open("wb") as out, gzip.GzipFile("", "wb", fileobj=out, mtime=seconds) as packed:
        packed.write(raw.getvalue())


def told(*words: str) -> str:
    return subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
