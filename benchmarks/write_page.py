"""Runs the benchmarks, one after the other, and writes their output to docs/generated/benchmarks.md.

    python benchmarks/write_page.py                     (make bench)
    python benchmarks/write_page.py init throughput     only these

Each benchmark has a section with date, machine and command. Sections of benchmarks that did not run stay word for word,
and so does the text before the first section. The page is written after each benchmark, and the others run even if one
fails.
"""

import argparse
import ast
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "generated" / "benchmarks.md"
SECTIONS = {
    "init": "Initialisation",
    "throughput": "Throughput",
    "start": "Start of a run",
    "early": "Early start",
    "adapt": "A training loop of your own",
    "pairs_peers": "Preference pairs",
    "gpu": "On a GPU",
    "gpus": "On several GPUs",
    "gpu_defaults": "Defaults on GPUs",
    "plan": "Plan of time",
    "settings": "Settings",
}
NAMED_ONLY = ("gpu", "gpus", "early", "pairs_peers", "settings")
"""Skipped unless they are named: each needs a GPU, or takes twenty minutes or more."""
TOGETHER = {"throughput": ("--rows", "32", "--rounds", "3"), "start": ("--rounds", "3")}
"""Options that shorten a benchmark when all run."""
INTRO = """\
# Benchmarks

`make bench` runs the benchmarks and writes their output, with date and machine.
`python benchmarks/write_page.py NAME` runs one and keeps the other sections. How each is measured, and what its columns
mean, says `benchmarks/NAME.py --help`. Compare ratios within a table, not seconds between machines.
"""
MISSING = "Not measured yet."
PROCESSOR_FEATURES = {
    "bfloat16": ("avx512_bf16", "amx_bf16", "bf16"),
    "AMX": ("amx_tile",),
    "AVX-512": ("avx512f",),
    "AVX2": ("avx2",),
}
"""Feature -> flags of /proc/cpuinfo, of which one is enough; bf16 is the flag of Arm."""


@dataclass(frozen=True)
class Measured:
    command: str
    output: str
    date: str
    machine: str


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    without = ", ".join(NAMED_ONLY)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all without {without}")
    names = parser.parse_args(argv).names
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"{unknown[0]}: not one of {', '.join(SECTIONS)}")
    failed = 0
    for name in names or [name for name in SECTIONS if name not in NAMED_ONLY]:
        options = () if names else TOGETHER.get(name, ())
        command = ["python", f"benchmarks/{name}.py", *options]
        output, code = run([sys.executable, *command[1:]])
        if code:
            failed = code
            told = f"{shlex.join(command)}: exit code {code}; its section stays as it was"
            print(told, file=sys.stderr)
            continue
        day = time.strftime("%Y-%m-%d")
        write(PAGE, name, Measured(shlex.join(command), output, day, machine()))
    return failed


def run(command: Sequence[str]) -> tuple[str, int]:
    """Run a command and show its output; return (output, exit code)."""
    lines = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return "".join(lines), process.returncode


def write(page: Path, name: str, measured: Measured) -> None:
    """Update the page; it is replaced at once, so a killed process leaves the old page."""
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    aside = page.with_name(f".{page.name}.new")
    aside.write_text(renewed(old, name, measured), encoding="utf-8")
    aside.replace(page)


def renewed(old: str, name: str, measured: Measured) -> str:
    """Return the page with one new section; all others stay word for word."""
    before, sections = split(old)
    sections[SECTIONS[name]] = section(name, measured, before)
    everything = dict.fromkeys(SECTIONS.values(), MISSING) | sections
    parts = [before or INTRO.strip()]
    parts += [f"## {heading}\n\n{text}" for heading, text in everything.items()]
    return "\n\n".join(parts) + "\n"


def split(page: str) -> tuple[str, dict[str, str]]:
    """Return (text before the first section, heading -> text); headings within fences do not count."""
    parts: list[tuple[str, list[str]]] = [("", [])]
    fence = ""
    for line in page.splitlines():
        ticks = re.match(r"`{3,}", line)
        if ticks and not fence:
            fence = ticks[0]
        elif ticks and line.strip() == ticks[0] and len(ticks[0]) >= len(fence):
            fence = ""
        if line.startswith("## ") and not fence:
            parts.append((line.removeprefix("## ").strip(), []))
        else:
            parts[-1][1].append(line)
    (_, first), *others = parts
    sections = {heading: "\n".join(lines).strip() for heading, lines in others}
    return "\n".join(first).strip(), sections


def section(name: str, measured: Measured, before: str = "") -> str:
    """Return what a benchmark measures and its output; the machine only if the page's first text does not name it."""
    lines = measured.output.replace(str(ROOT), ".").strip("\n").splitlines()
    printed = "\n".join(line.rstrip() for line in lines)
    longest = max((len(ticks) for ticks in re.findall(r"`{3,}", printed)), default=2)
    fence = "`" * (longest + 1)
    where = "" if measured.machine in " ".join(before.split()) else f", on {measured.machine}"
    told = f"{description(name)}\n\n`{measured.command}`, {measured.date}{where}:"
    return f"{told}\n\n{fence}text\n{printed}\n{fence}"


def description(name: str) -> str:
    """Return the first paragraph of a benchmark's docstring."""
    source = (ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8")
    text = ast.get_docstring(ast.parse(source)) or ""
    return text.partition("\n\n")[0]


def machine() -> str:
    """Return processor, features, memory and versions, without a name that identifies the machine."""
    info = _processor_information()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    features = [name for name, some in PROCESSOR_FEATURES.items() if flags & set(some)]
    missing = "" if "bfloat16" in features else "; no native bfloat16"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "ray"))
    return (
        f"{os.cpu_count()} cores ({info.get('model name') or platform.machine()};"
        f" {', '.join(features) or 'no known vector extensions'}{missing}), {memory:.0f} GiB,"
        f" Python {platform.python_version()}, {versions}"
    )


def _processor_information() -> Mapping[str, str]:
    file = Path("/proc/cpuinfo")
    first = file.read_text().partition("\n\n")[0] if file.exists() else ""
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
