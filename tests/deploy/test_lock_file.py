"""The locked packages fit the project's requirements and the manifests."""

import csv
import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.deploy.test_kuberay import found_under
from tools import write_lock

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "deploy" / "requirements.lock").read_text()
LOCKED = write_lock.locked(TEXT)
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NODE = {
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "os_name": "posix",
}
NODE |= {"python_version": "3.11", "python_full_version": "3.11.9"}
NODE |= {"platform_python_implementation": "CPython", "implementation_name": "cpython"}


def wanted() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"]
    more = [text for extra in write_lock.EXTRAS for text in extras[extra]]
    return [Requirement(text) for text in PROJECT["dependencies"] + more]


def unmet(requirement: Requirement) -> str | None:
    """Return the reason why the lock does not meet a requirement."""
    version = LOCKED.get(canonicalize_name(requirement.name))
    if version is None:
        return f"{requirement}: not in the lock"
    met = requirement.specifier.contains(version, prereleases=True)
    return None if met else f"{requirement}: the lock has {version}"


def below(requirement: Requirement) -> Iterator[Requirement]:
    """Return the requirements of a requirement's package, if that version is installed here."""
    try:
        found = distribution(requirement.name)
    except PackageNotFoundError:
        return
    if found.version.partition("+")[0] != LOCKED.get(canonicalize_name(requirement.name)):
        return
    for text in found.requires or []:
        inner = Requirement(text)
        extras = ["", *sorted(requirement.extras)]
        if inner.marker is None or any(
            inner.marker.evaluate({**NODE, "extra": extra}) for extra in extras
        ):
            yield inner


def test_developers_get_exact_public_versions_of_all_that_the_project_wants() -> None:
    text = (ROOT / "requirements-dev.lock").read_text()
    pins = [line for line in text.splitlines() if not line.startswith("#")]
    versions = dict(pin.split("==") for pin in pins)
    exact = r"[a-z0-9][a-z0-9._-]*==[0-9][0-9a-z.]*"
    assert [pin for pin in pins if not re.fullmatch(exact, pin)] == []
    for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), text


def test_the_lock_is_a_list_of_exact_public_versions_with_hashes() -> None:
    entries = re.sub(r"(?m)^#.*\n", "", TEXT).replace(" \\\n", "").splitlines()
    assert len(entries) == len(LOCKED) > 100
    for entry in entries:
        # No index, no address, no path, no +cpu: it installs from whatever index the node uses.
        assert re.fullmatch(
            r"[a-z0-9][a-z0-9._-]*==[0-9][0-9a-z.]*(    --hash=sha256:[0-9a-f]{64})+", entry
        ), entry
        assert Version(LOCKED[entry.partition("==")[0]]).local is None
    assert not re.search(r"https?:|index-url|find-links|/tmp|/home|/work|/root", TEXT)


def test_every_requirement_of_the_project_is_met() -> None:
    assert {"ray", "torch", "gguf", "lm-eval"} <= {requirement.name for requirement in wanted()}
    assert [problem for problem in map(unmet, wanted()) if problem] == []


def test_so_is_what_they_need_themselves_with_their_extras() -> None:
    ahead, seen, problems = wanted(), set[tuple[str, frozenset[str]]](), []
    while ahead:
        requirement = ahead.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        problems.append(unmet(requirement))
        if key not in seen:
            seen.add(key)
            ahead.extend(below(requirement))
    assert [problem for problem in problems if problem] == []


@pytest.mark.parametrize(
    "file", sorted(write_lock.MANIFESTS.glob("*.yaml")), ids=lambda file: file.stem
)
def test_the_manifests_name_the_locks_ray(file: Path) -> None:
    text = file.read_text()
    assert write_lock.stamped(text, LOCKED["ray"]) == text
    tree = list(yaml.safe_load_all(text))
    assert set(found_under(tree, "rayVersion")) <= {LOCKED["ray"]}
    # The image's name and tag stand there alone: `kubectl apply -k` writes them into the others.
    assert set(found_under(tree, "image")) <= {"olora-ray"}


def test_each_locked_package_names_a_license_that_lets_others_keep_their_code() -> None:
    lines = list(csv.reader((ROOT / "deploy" / "licenses.csv").open()))[1:]
    assert {name: version for name, version, _ in lines} == LOCKED, "make lock writes it"
    strong = re.compile(r"\b(A?GPL|Affero|non-?commercial|CC.BY.NC)", re.IGNORECASE)
    assert [line for line in lines if strong.search(line[2])] == []
