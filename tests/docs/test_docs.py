"""The documentation names only what exists, and stays short; pages, messages and docstrings use plain words."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest

from olora_ray.config.section import Section
from tools import list_messages, run_recipes, write_configuration

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SKILL = ROOT / "skills" / "olora-ray" / "SKILL.md"

pages = pytest.mark.parametrize(
    "page",
    [*PAGES, SKILL, *(ROOT / "pipelines").rglob("*/README.md")],
    ids=lambda page: str(page.relative_to(ROOT)),
)


def links(page: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            yield target


@cache
def fields() -> dict[str, Any]:
    """Every section of a config file, as a tree of names; `olora-ray compare` adds one."""
    return _tree(write_configuration.SCHEMAS["config"])


def _tree(section: type[Section]) -> dict[str, Any]:
    return {
        field.alias or name: _inner(field.annotation)
        for name, field in section.model_fields.items()
    }


def _inner(annotation: Any) -> dict[str, Any]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return _tree(annotation)
    return next((found for inner in get_args(annotation) if (found := _inner(inner))), {})


def is_field(dotted: str) -> bool:
    node = fields()
    for part in dotted.split("."):
        if part not in node:
            return False
        node = node[part]
    return True


def code(text: str) -> list[str]:
    """What stands between backticks, and the indented and fenced blocks, without the output of a run."""
    blocks = re.findall(r"^    .+$", text, re.MULTILINE) + re.findall(
        r"^```\w*\n(.*?)^```", text, re.M | re.S
    )
    return re.findall(r"`([^`\n]+)`", text) + [
        block for block in blocks if not re.match(r" +\d\d:\d\d:\d\d ", block)
    ]


def test_the_readme_stays_short_and_the_pages_few() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 200
    assert len(readme.split()) <= 1500
    assert [line for line in readme.splitlines() if len(line) > 120] == []
    assert len(list((ROOT / "docs").glob("*.md"))) <= 19


# Phrases that a reader with English as a second language reads twice. Use: resumes; earlier, previous; current;
# unreachable, lost; reaches the end; another user; no longer does; is missing; again; fix; per second.
UNPLAIN = re.compile(
    r"\b(?:go(?:es)? on|of (?:before|now)|(?:is|are) (?:away|not there)|comes? to the end|somebody|does no longer|anew"
    r"|mend(?:s|ed)?|(?:tokens|rows|steps|bytes) a (?:second|worker|step))\b"
)
FRAGMENT = re.compile(r"(?:Whether|What|How|Of|Where|As|If|When)\b")


def test_pages_have_no_phrase_that_is_read_twice() -> None:
    written = [page for page in PAGES if page.parent.name != "generated"]
    texts = {page.name: page.read_text(encoding="utf-8") for page in written}
    assert [f"{name}: {phrase}" for name, text in texts.items() for phrase in unplain(text)] == []


@pytest.mark.parametrize("folder", ["olora_ray", "pipelines"])
def test_messages_and_docstrings_have_no_phrase_that_is_read_twice(folder: str) -> None:
    problems = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        source = file.read_text(encoding="utf-8")
        docstrings = [
            (node.lineno, node.value.value)
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ]
        problems += [
            f"{file.name}:{line}: {text[:40]}"
            for line, text in docstrings
            if FRAGMENT.match(text.strip())
        ]
        for line, text in [*docstrings, *list_messages.messages(source)]:
            problems += [f"{file.name}:{line}: {phrase}" for phrase in unplain(text)]
    assert problems == []


def unplain(text: str) -> list[str]:
    return UNPLAIN.findall(" ".join(text.split()))


def test_the_numbers_of_a_recipe_are_of_its_files() -> None:
    assert run_recipes.main(["--check"]) == 0


def test_the_readme_links_every_page() -> None:
    linked = {link.partition("#")[0] for link in links(ROOT / "README.md")}
    assert [str(page) for page in PAGES[2:] if str(page.relative_to(ROOT)) not in linked] == []


@pages
def test_commands_and_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    # What is at a tag alone stands in a paragraph that names it.
    parts = [part for part in text.split("\n\n") if "before-open" not in part]
    places = (
        r"(?:pipelines|tune_spaces|deploy|benchmarks|tests|olora_ray|docs)/"
        r"[a-z\d_/.-]+\.(?:py|yaml|json|md|png|env)"
    )
    for name in sorted(set(re.findall(rf"(?<![\w/]){places}\b", "\n\n".join(parts)))):
        assert (ROOT / name).is_file(), name
    assert "olora_ray.registry" not in text


@pages
def test_make_targets_exist(page: Path) -> None:
    there = set(
        re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert "quickstart" in there
    for piece in code(page.read_text(encoding="utf-8")):
        for target in re.findall(r"^ *make ([\w-]+)", piece):
            assert target in there, target


@pages
def test_config_fields_exist(page: Path) -> None:
    # `train.lr`, `train.lr=2e-4`, `train.lr: 2e-4`; not `train.py` or `run.log`.
    sections = "|".join(fields())
    for piece in code(page.read_text(encoding="utf-8")):
        for field in re.findall(rf"(?<![\w/.-])((?:{sections})(?:\.[a-z]\w*)+)(?![\w/*(])", piece):
            assert field.endswith((".py", ".yaml", ".json", ".jsonl", ".env", ".log")) or is_field(
                field
            ), field


def test_the_checks_above_find_something() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = [piece for piece in code(text) if is_field(piece)]
    assert len(named) > 15
    assert sum(1 for page in PAGES for _ in links(page)) > 40
    assert is_field("gate.and.at_least")
    assert not is_field("train.learning_rate")


def test_the_readmes_output_is_that_of_the_quickstart() -> None:
    full = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8").splitlines()
    shown = re.findall(
        r"^    \d\d:\d\d:\d\d .+$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(shown) > 8
    for line in shown:
        cut = line.removesuffix(" ...")
        assert any(each == line or (cut != line and each.startswith(cut)) for each in full), line
