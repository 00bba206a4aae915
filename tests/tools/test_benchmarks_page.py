"""docs/generated/benchmarks.md: a benchmark's section is written anew, and the others stay word for word."""

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
    assert list(sections)[:3] == ["Initialisation", "Throughput", "Start of a run"]
    assert sections["Initialisation"].endswith(f"```text\n{PRINTED.strip()}\n```")
    assert (
        "`python benchmarks/init.py`, 2026-11-26, on 2 cores of a test:"
        in sections["Initialisation"]
    )
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
