"""Writes deploy/requirements.lock: the packages that nodes install, at the versions that the tests ran with.

    .venv/bin/python tools/write_lock.py UV          (make lock)

UV is the program uv. It resolves pyproject.toml with the extras that nodes need, for Linux on x86-64 and Python 3.11,
where each package that is installed here keeps its version; what is not installed here (CUDA's libraries) follows.
A build's tag such as torch's +cpu is cut off: the ordinary PyPI has the version without it. Each package has the
SHA-256 of all its files, so that nodes install these files or fail. The manifests of KubeRay get the lock's Ray: in
rayVersion, and in the image's tag, which kustomization.yaml has.

To take newer versions: make clean setup test lock.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "deploy" / "requirements.lock"
MANIFESTS = ROOT / "deploy" / "kuberay"
EXTRAS = ("gguf", "eval", "quant", "s3", "postgresql")
PLATFORM, PYTHON = "x86_64-manylinux_2_28", "3.11"
HEADER = """\
# What every node installs: pyproject.toml's packages and its extras gguf, eval, quant, s3 and postgresql, for Linux on
# x86-64 and Python 3.11, at the versions that the tests ran with. Written by `make lock`.
# The hashes are those of PyPI's files: pip and uv refuse others. torch from its index for CPUs has others
# (install_node.sh).
"""


def main(argv: Sequence[str]) -> int:
    """Write the lock, and the manifests that name its Ray."""
    if len(argv) != 1:
        raise SystemExit((__doc__ or "").strip())
    LOCK.write_text(HEADER + resolved(argv[0], constraints()))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    ray = locked(LOCK.read_text())["ray"]
    for file in sorted(MANIFESTS.glob("*.yaml")):
        file.write_text(stamped(file.read_text(), project, ray))
    return 0


def constraints() -> str:
    """The packages that are installed here, as requirements without a build's tag."""
    found = {canonical(one.metadata["Name"]): one.version.partition("+")[0] for one in distributions()}
    return "".join(f"{name}=={version}\n" for name, version in sorted(found.items()) if name != "olora-ray")


def resolved(uv: str, limits: str) -> str:
    """What uv makes of pyproject.toml within `limits`, without anything of this machine."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(limits)
        file.flush()
        command = [uv, "pip", "compile", "pyproject.toml", "--quiet", "--constraint", file.name]
        command += [word for extra in EXTRAS for word in ("--extra", extra)]
        command += ["--python-platform", PLATFORM, "--python-version", PYTHON]
        command += ["--generate-hashes", "--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links"]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)  # uv has said why
    return done.stdout


def locked(text: str) -> dict[str, str]:
    """Package -> version, of a lock's text."""
    found = re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)
    return {canonical(name): version for name, version in found}


def stamped(manifest: str, project: str, ray: str) -> str:
    """A manifest whose clusters have this Ray, and whose image is of this project with this Ray."""
    manifest = re.sub(r'(\brayVersion: )"[^"]*"', rf'\g<1>"{ray}"', manifest)
    return re.sub(r"(\bnewTag: )\S+", rf"\g<1>{project}-ray{ray}", manifest)


def canonical(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
