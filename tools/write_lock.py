"""Writes deploy/requirements.lock: the packages that nodes install, in the versions that the tests use.

requirements-dev.lock gets the versions of all packages that are installed here, for developers.

    .venv/bin/python tools/write_lock.py UV          (make lock)

UV is the path of the program uv. It resolves pyproject.toml with the extras that nodes need, for Linux on x86-64 and
Python 3.11. Packages that are installed here keep their versions, and uv chooses the others (CUDA's libraries). A local
build tag such as torch's +cpu is removed, because PyPI only has the version without it. Each package has the SHA-256 of
all its files, so nodes install exactly these files or fail. The KubeRay manifests get the Ray version of the lock, and
deploy/licenses.csv the license that each package names.

To take newer versions: make clean setup test lock.
"""

import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageMetadata, distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "deploy" / "requirements.lock"
DEVELOPERS = ROOT / "requirements-dev.lock"
LICENSES = ROOT / "deploy" / "licenses.csv"
MANIFESTS = ROOT / "deploy" / "kuberay"
EXTRAS = ("gguf", "eval", "quant", "s3", "postgresql")
PLATFORM, PYTHON = "x86_64-manylinux_2_28", "3.11"
HEADER = """\
# What every node installs: pyproject.toml's packages and its extras gguf, eval, quant, s3 and postgresql, for Linux on
# x86-64 and Python 3.11, at the versions that the tests ran with. Written by `make lock`.
# The hashes are those of PyPI's files: pip and uv refuse others. torch from its index for CPUs has others
# (install_node.sh).
"""
DEVELOPERS_HEADER = """\
# All packages that the tests ran with, on Python {python}. Written by `make lock`. To install these versions:
# PIP_CONSTRAINT=$PWD/requirements-dev.lock make setup
"""


def main(argv: Sequence[str]) -> int:
    if len(argv) != 1:
        raise SystemExit((__doc__ or "").strip())
    LOCK.write_text(HEADER + resolved(argv[0], constraints()))
    python = ".".join(platform.python_version_tuple()[:2])
    DEVELOPERS.write_text(DEVELOPERS_HEADER.format(python=python) + constraints())
    pins = locked(LOCK.read_text())
    LICENSES.write_text(licenses(pins))
    ray = pins["ray"]
    for file in sorted(MANIFESTS.glob("*.yaml")):
        file.write_text(stamped(file.read_text(), ray))
    return 0


def constraints() -> str:
    """Return the installed packages as requirements, without build tags."""
    versions = {
        canonical(package.metadata["Name"]): package.version.partition("+")[0]
        for package in distributions()
    }
    return "".join(
        f"{name}=={version}\n" for name, version in sorted(versions.items()) if name != "olora-ray"
    )


def resolved(uv: str, limits: str) -> str:
    # The index and link options stay out of the lock, because they may name servers of this machine's network.
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(limits)
        file.flush()
        command = [uv, "pip", "compile", "pyproject.toml", "--quiet", "--constraint", file.name]
        command += [word for extra in EXTRAS for word in ("--extra", extra)]
        command += ["--python-platform", PLATFORM, "--python-version", PYTHON]
        command += [
            "--generate-hashes",
            "--no-header",
            "--no-annotate",
            "--no-emit-index-url",
            "--no-emit-find-links",
        ]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)  # uv has printed the reason
    return done.stdout


def locked(text: str) -> dict[str, str]:
    pins = re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)
    return {canonical(name): version for name, version in pins}


def licenses(pins: Mapping[str, str]) -> str:
    """Return a line per package: name, version, license."""
    found = {
        canonical(package.metadata["Name"]): license_of(package.metadata)
        for package in distributions()
    }
    rows = [
        f'{name},{version},"{found.get(name, "not installed here")}"\n'
        for name, version in sorted(pins.items())
    ]
    return "package,version,license\n" + "".join(rows)


def license_of(metadata: PackageMetadata) -> str:
    named = [
        each.rpartition(" :: ")[2]
        for each in metadata.get_all("Classifier") or ()
        if each.startswith("License")
    ]
    named = [each for each in named if each != "OSI Approved"]
    text = str(metadata.json.get("license") or "").strip().partition("\n")[0]
    return str(
        metadata.json.get("license_expression") or "; ".join(named) or text[:70] or "names none"
    )


def stamped(manifest: str, ray: str) -> str:
    """Return a manifest with this version of Ray."""
    return re.sub(r'(\brayVersion: )"[^"]*"', rf'\g<1>"{ray}"', manifest)


def canonical(name: str) -> str:
    # Indexes treat "-", "_" and "." in names as equal (PEP 503).
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
