"""docs/generated/benchmarks.md: a benchmark's section is written anew, and the others stay word for word."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import write_page
from benchmarks.write_page import MISSING, SECTIONS, Measured

PRINTED = """\
AMD EPYC, 2 cores, 1 threads, with native bfloat16; load 0.1

weights, float32          ours s
--------------------------------
one matrix, 4096 x 4096    0.013
"""


def measured(output: str = PRINTED, date: str = "2026-11-26") -> Measured:
    return Measured("python benchmarks/init.py", output, date, "2 cores of a test")


def test_a_new_page_has_a_section_for_each_benchmark() -> None:
    before, sections = write_page.split(write_page.renewed("", "init", measured()))
    assert before == write_page.INTRO.strip()
    assert list(sections) == list(SECTIONS.values())
    assert list(sections)[:3] == ["Initialisation", "Throughput", "Roofline"]
    assert sections["Initialisation"].endswith(f"```text\n{PRINTED.strip()}\n```")
    assert "`python benchmarks/init.py`, 2026-11-26, on 2 cores of a test:" in sections["Initialisation"]
    assert "beside PEFT's" in sections["Initialisation"]  # from the script's docstring
    assert {text for heading, text in sections.items() if heading != "Initialisation"} == {MISSING}


def test_every_script_that_is_run_by_hand_has_a_section() -> None:
    # The others are parts of these: their docstrings show no command of their own.
    scripts = {
        file.stem
        for file in (write_page.ROOT / "benchmarks").glob("*.py")
        if f"\n    python benchmarks/{file.name}" in file.read_text(encoding="utf-8")
    }
    assert scripts - {"write_page"} == set(SECTIONS)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A tree with the script and benchmarks that print one line, of which `scaling` fails."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (tmp_path / "docs" / "generated").mkdir(parents=True)
    for name in SECTIONS:
        ending = "raise SystemExit(3)" if name == "scaling" else ""
        (folder / f"{name}.py").write_text(
            f'"""About {name}."""\nimport sys\nprint("table of {name}", *sys.argv[1:])\n{ending}\n'
        )
    shutil.copy(write_page.__file__, folder)
    return tmp_path


def script(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, root / "benchmarks" / "write_page.py", *words], capture_output=True, text=True, check=False
    )


def test_one_that_fails_keeps_no_other_from_running_and_is_told(elsewhere: Path) -> None:
    done = script(elsewhere)
    assert done.returncode == 3
    _, sections = write_page.split((elsewhere / "docs" / "generated" / "benchmarks.md").read_text())
    left_out = {*write_page.NAMED_ONLY, *(() if torch.cuda.is_available() else write_page.NEEDS_GPU)}
    run = [name for name in SECTIONS if name not in left_out]
    assert [heading for heading, text in sections.items() if "table of" in text] == [
        SECTIONS[name] for name in run if name != "scaling"
    ]
    shown = [" ".join(("table of", name, *write_page.TOGETHER.get(name, ()))) for name in run]
    assert done.stdout.splitlines() == shown
    assert "python benchmarks/scaling.py --steps 3: exit code 3; its section stays as it was" in done.stderr
