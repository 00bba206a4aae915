"""The format of CONTRIBUTING.md: as one file and one line here, and as an installed package."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from olora_ray.common.errors import UserError
from olora_ray.config import tables
from olora_ray.config.command_line import help_text
from olora_ray.data import formats
from olora_ray.tokens.prepare import plan_here
from olora_ray.tokens.preview import describe
from tests import plugins, tiny
from tests.pipelines.project import ROOT
from tests.tokens import helpers

ROW = {"input": "two and two?", "target": "four"}
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
DIFF = re.findall(r"(?s)```diff\n(.*?)```", PAGE)[0]
CODE = "".join(f"{line[1:]}\n" for line in DIFF.splitlines() if re.match(r"\+(?!\+\+)", line))
CODE, LINE = CODE[: CODE.rindex(")\n") + 2], CODE[CODE.rindex(")\n") + 2 :]
PROJECT = re.findall(r"(?s)```toml\n(.*?)```", PAGE)[0]
ENTRIES = "[olora_ray.formats]\ninput_target = my_rows:FORMAT\n"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget what this process knows of formats, before and after a test."""
    cached = (formats.format_named, formats.own_formats, formats.field_names)
    for each in cached:
        each.cache_clear()
    monkeypatch.delitem(sys.modules, "my_rows", raising=False)
    yield
    for each in cached:
        each.cache_clear()


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "site"
    plugins.install(monkeypatch, folder, "my-rows", "my_rows", CODE, ENTRIES)
    return folder


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rows.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert isinstance(tables.FORMATS.own, dict)
    monkeypatch.setitem(tables.FORMATS.own, "input_target", "my_rows:FORMAT")


def config(tmp_path: Path, format: str = "input_target", row: Any = ROW, **more: Any) -> Any:
    path = helpers.write_jsonl(tmp_path / "a.jsonl", [row])
    return helpers.config(
        tmp_path / "runs", {"path": str(path), "format": format, **more}, max_length=512
    )


def digest(config: Any) -> str:
    return plan_here(config, helpers.spec(), "train").digest()


def supervised(config: Any) -> str:
    example = describe(tiny.read_as(config), helpers.spec()).examples[0]
    return helpers.decode(example.input_ids[example.mask])


def test_the_page_shows_the_line_of_the_index() -> None:
    assert LINE.strip() == '"input_target": "olora_ray.data.formats.input_target:FORMAT",'
    group = tomllib.loads(PROJECT)["project"]["entry-points"][tables.FORMATS.group]
    assert group == {"input_target": "my_rows:FORMAT"}


@pytest.mark.usefixtures("own")
def test_one_file_and_one_line_are_detected_shown_in_the_help_and_supervised(
    tmp_path: Path,
) -> None:
    assert supervised(config(tmp_path)) == "four<|im_end|>"
    assert tiny.read_as(config(tmp_path, "auto")).data.train[0].format == "input_target"
    text = " ".join(help_text().split())
    assert "text, tokens, input_target" in text
    assert "input_target {input, target}" in text


@pytest.mark.usefixtures("installed")
def test_the_format_of_an_installed_package_supervises_the_answer(tmp_path: Path) -> None:
    assert supervised(config(tmp_path)) == "four<|im_end|>"
    renamed = {"q": "two and two?", "target": "four"}
    assert supervised(config(tmp_path, row=renamed, fields={"input": "q"})) == "four<|im_end|>"
    with pytest.raises(UserError):
        tiny.read_as(config(tmp_path, fields={"prompt": "input"}))
    with pytest.raises(UserError):
        config(tmp_path, chat=False)


def test_installing_a_package_changes_no_other_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tiny.read_as(config(tmp_path, "auto"))
    name = digest(before)
    plugins.install(monkeypatch, tmp_path / "site", "my-rows", "my_rows", CODE, ENTRIES)
    after = tiny.read_as(config(tmp_path, "auto"))
    assert after == before
    assert after.data.train[0].format == "prompt_completion"
    assert digest(after) == name


def test_a_format_without_a_needed_column_is_refused(installed: Path) -> None:
    (installed / "my_rows.py").write_text(CODE.replace(", needed=True", ""))
    with pytest.raises(UserError) as caught:
        formats.format_named("input_target")
    assert "my-rows 1.0" in str(caught.value)


def test_pip_installs_the_package_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "my_rows.py").write_text(CODE)
    (project / "pyproject.toml").write_text(PROJECT)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    target = tmp_path / "site"
    done = subprocess.run(
        [*command, "--quiet", "--no-index", "--target", target, project],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    monkeypatch.syspath_prepend(str(target))
    assert tables.FORMATS.names()[-1] == "input_target"
    assert supervised(config(tmp_path)) == "four<|im_end|>"
