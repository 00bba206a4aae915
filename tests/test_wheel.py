"""What `pip install` gives: the wheel in an environment of its own, used from an empty folder."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pipelines import project

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.lengthy
Command = Callable[..., "subprocess.CompletedProcess[str]"]


def run(*words: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(word) for word in words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder, env=environment)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built of a copy: a build leaves things in its folder."""
    source = tmp_path_factory.mktemp("source")
    for name in ("olora_ray", "pipelines", "tune_spaces", "docs/generated"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", source)
    done = run(sys.executable, "-m", "pip", "wheel", *options, source, folder=source)
    assert done.returncode == 0, done.stdout
    return next(source.glob("*.whl"))


@pytest.fixture(scope="module")
def olora_ray(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The installed command, in an environment that sees the packages of this one."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False, symlinks=True)
    python = place / "bin" / "python"
    install = ("install", "--no-deps", "--no-index", "--no-compile", wheel)
    done = run(sys.executable, "-m", "pip", "--python", python, *install, folder=place)
    assert done.returncode == 0, done.stderr
    (packages,) = place.glob("lib/*/site-packages")
    (packages / "beside.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    return lambda *words, folder: run(place / "bin" / "olora-ray", *words, folder=folder)


def test_the_wheel_has_what_its_commands_name_and_no_name_of_others(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in names} == {"olora_ray", "olora_ray-0.1.0.dist-info"}
    kept = {
        *(ROOT / "pipelines").glob("*.py"),
        *(ROOT / "pipelines" / "comparison").glob("*.py"),
        *(ROOT / "pipelines" / "quickstart").glob("*.jsonl"),
        *(ROOT / "tune_spaces").glob("*.yaml"),
        *(ROOT / "docs" / "generated").glob("*.json"),
        ROOT / "pipelines" / "configs" / "quickstart.yaml",
        ROOT / "pipelines" / "configs" / "compare-demo.yaml",
    }
    assert {f"olora_ray/shipped/{file.relative_to(ROOT)}" for file in kept} == {
        name for name in names if name.startswith("olora_ray/shipped/")
    }
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "olora_ray").rglob("*.py")}
    assert modules <= names


def test_each_command_has_its_help(olora_ray: Command, tmp_path: Path) -> None:
    assert olora_ray("--version", folder=tmp_path).stdout == "olora-ray 0.1.0\n"
    shown = olora_ray("--help", folder=tmp_path).stdout
    commands = [line.split()[0] for line in shown.splitlines() if line.startswith("  ") and line[2] != " "]
    assert len(commands) > 6
    for command in commands:
        done = olora_ray(command, "--help", folder=tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), command
        assert f"    olora-ray {command} " in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_run_is_planned_and_the_examples_are_there(olora_ray: Command, tmp_path: Path) -> None:
    project.make_tiny(tmp_path)
    made = olora_ray("init", "train.jsonl", "model", folder=tmp_path)
    assert (made.returncode, made.stderr) == (0, "")
    schema = (tmp_path / "my_run.yaml").read_text().splitlines()[0].partition("$schema=")[2]
    assert Path(schema).parts[-3:] == ("docs", "generated", "config.schema.json")
    assert Path(schema).is_file()
    for words in (["my_run.yaml"], ["model.name=model"]):  # the second is the quickstart's config and rows
        done = olora_ray("finetune", *words, "--dry-run", folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "examples, with the supervised tokens in [[ ]]" in done.stdout
    words = ("pipelines/configs/quickstart.yaml", "tune_spaces/nothing.yaml")
    refused = olora_ray("sweep", *words, folder=tmp_path)
    assert refused.stderr == "error: space file tune_spaces/nothing.yaml: No such file or directory\n"
