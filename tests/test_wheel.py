"""What `pip install` gives: the wheel in an environment of its own, used from an empty folder."""

import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.installed import ROOT, Command, run
from tests.pipelines import project
from tools import build_release


def test_the_wheel_has_what_its_commands_name_and_no_name_of_others(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in names} == {"olora_ray", "olora_ray-0.1.0.dist-info"}
    kept = {
        *(ROOT / "pipelines").glob("*.py"),
        *(ROOT / "pipelines" / "contrib").rglob("*.py"),
        *(ROOT / "pipelines" / "contrib").rglob("*.yaml"),
        *(ROOT / "pipelines" / "recipes").glob("*/[!_]*.*"),
        *(ROOT / "pipelines" / "quickstart").glob("*.jsonl"),
        *(ROOT / "tune_spaces").glob("*.yaml"),
        *(ROOT / "docs" / "generated").glob("*.json"),
        ROOT / "pipelines" / "other_tools.yaml",
        ROOT / "pipelines" / "configs" / "quickstart.yaml",
    }
    assert {f"olora_ray/shipped/{file.relative_to(ROOT)}" for file in kept} == {
        name for name in names if name.startswith("olora_ray/shipped/")
    }
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "olora_ray").rglob("*.py")}
    assert modules <= names


def test_each_module_is_imported_without_undeclared_packages(
    installed: Path, tmp_path: Path
) -> None:
    # Triton comes with torch for GPUs only.
    program = (
        "import importlib, pkgutil, olora_ray\n"
        "for each in pkgutil.walk_packages(olora_ray.__path__, 'olora_ray.'):\n"
        "  if each.name != 'olora_ray.train.kernels': importlib.import_module(each.name)\n"
        "print(olora_ray.__path__[0])\n"
        "try: import pytest\n"
        "except ImportError: print('bare')"
    )
    done = run(installed / "python", "-c", program, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    place, bare = done.stdout.splitlines()[-2:]
    assert (place.endswith("site-packages/olora_ray"), bare) == (True, "bare")


def test_a_run_is_planned_and_the_examples_are_there(olora_ray: Command, tmp_path: Path) -> None:
    project.make_tiny(tmp_path)
    made = olora_ray("init", "train.jsonl", "model", folder=tmp_path)
    assert (made.returncode, made.stderr) == (0, "")
    schema = (tmp_path / "my_run.yaml").read_text().splitlines()[0].partition("$schema=")[2]
    assert Path(schema).parts[-3:] == ("docs", "generated", "config.schema.json")
    assert Path(schema).is_file()
    for words in (["finetune", "my_run.yaml"], ["quickstart", "model.name=model"]):
        done = olora_ray(*words, "--dry-run", folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "examples, with the supervised tokens in [[ ]]" in done.stdout
    words = ("pipelines/configs/quickstart.yaml", "tune_spaces/nothing.yaml")
    refused = olora_ray("sweep", *words, folder=tmp_path)
    assert (
        refused.stderr == "error: space file tune_spaces/nothing.yaml: No such file or directory\n"
    )


def test_a_recipe_is_copied_with_what_makes_its_rows(
    olora_ray: Command, installed: Path, tmp_path: Path
) -> None:
    listed = olora_ray("init", "--recipe", folder=tmp_path).stdout.splitlines()
    assert "tool_calls" in [line.split()[0] for line in listed]
    for code in (0, 2):  # the second finds the folder of the first
        assert olora_ray("init", "--recipe", "tool_calls", folder=tmp_path).returncode == code
    assert olora_ray("init", "--recipe", "tools", folder=tmp_path).returncode == 2
    words = ("tool_calls/make_rows.py", "runs/recipes/tool_calls")
    assert run(installed / "python", *words, folder=tmp_path).returncode == 0
    project.make_model(tmp_path / "model")
    words = ("--dry-run", "model.name=model", "data.max_length=4096")
    done = olora_ray("finetune", "tool_calls/config.yaml", *words, folder=tmp_path)
    assert (done.returncode, done.stdout.count(", none rejected")) == (0, 2), done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("init", "error: arguments: expected DATA"),
        ("chat nothing", "error: run nothing: no such run folder"),
        ("evaluate model --tasks arc_easy", "error: --tasks: needs lm-eval"),
        ("sweep a.yaml b.yaml", "error: config file a.yaml: No such file or directory"),
        ("compare a.yaml", "error: config file a.yaml: No such file or directory"),
        ("registry list", "error: "),
    ],
)
def test_without_development_extras_a_mistake_is_a_line(
    olora_ray: Command, tmp_path: Path, words: str, said: str
) -> None:
    if "model" in words:
        project.make_model(tmp_path / "model")
    done = olora_ray(*words.split(), folder=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith(said)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the commit")
def test_a_release_has_the_same_bytes_at_each_build(tmp_path: Path) -> None:
    builds = [
        {each.name: each.read_bytes() for each in released(tmp_path / name)}
        for name in ("one", "two")
    ]
    assert builds[0] == builds[1]
    assert sorted(builds[0]) == ["olora_ray-0.1.0-py3-none-any.whl", "olora_ray-0.1.0.tar.gz"]


def released(folder: Path) -> Iterator[Path]:
    assert build_release.main([str(folder)]) == 0
    return folder.iterdir()
