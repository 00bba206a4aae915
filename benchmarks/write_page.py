"""Runs the benchmarks, one after the other, and writes their output to docs/generated/benchmarks.md.

    python benchmarks/write_page.py                          (make bench)
    python benchmarks/write_page.py init throughput          only these
    python benchmarks/write_page.py recovery -- --kills 5    one of them, with its own options
    python benchmarks/write_page.py early --output FILE      one of them, from its saved output; runs nothing

Each benchmark has a section with date, machine and command. Sections of benchmarks that did not run stay word for word,
and so does the text before the first section. The page is written after each benchmark, and the others run even if one
fails. At the end come the lines of the page that say whether a target is met. All together take about 90 minutes on two
cores: some run with fewer rounds than alone, and the longest ones run only if they are named.
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
    "roofline": "Roofline",
    "start": "Start of a run",
    "overhead": "Overhead of Ray",
    "scaling": "Scaling",
    "gpu": "On a GPU",
    "gpu_defaults": "Defaults on GPUs",
    "memory_published": "Memory plan and published peaks",
    "recovery": "Recovery",
    "optimizers": "Optimizers",
    "early": "Early start",
    "sweep": "Sweep",
    "searches": "Searches",
    "export": "Export",
    "sharded": "Sharded base",
    "tree": "Gradient tree",
    "exchange": "Exchange between machines",
    "memory": "Memory plan",
    "quantised": "Quantised base",
    "prepare": "Preparation",
    "scale": "A billion rows",
    "soak": "Soak",
    "learning_rate": "Learning rate",
    "paired_seeds": "Evidence",
    "settings": "Settings",
    "gate_years": "Years of nights",
}
NEEDS_GPU = ("gpu",)
"""Skipped without a GPU, unless they are named."""
NAMED_ONLY = (
    "recovery",
    "early",
    "sweep",
    "soak",
    "learning_rate",
    "paired_seeds",
    "settings",
    "gate_years",
)
"""Skipped unless they are named, because each takes twenty minutes or more."""
TOGETHER = {
    "throughput": ("--rows", "32", "--rounds", "3"),
    "roofline": ("--rounds", "2"),
    "start": ("--rounds", "3", "--no-search"),
    "overhead": ("--steps", "8", "--rounds", "2"),
    "scaling": ("--steps", "3"),
    "tree": ("--pairs", "5"),
    "quantised": ("--steps", "8"),
    "searches": ("replay",),
}
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
    names, options, output = _arguments(argv)
    failed = 0
    for name in names or _all():
        command = [
            "python",
            f"benchmarks/{name}.py",
            *(options if names else TOGETHER.get(name, ())),
        ]
        if output:
            printed = output.read_text(encoding="utf-8")
            day = time.strftime("%Y-%m-%d", time.localtime(output.stat().st_mtime))
        else:
            printed, code = run([sys.executable, *command[1:]])
            day = time.strftime("%Y-%m-%d")
            if code:
                print(
                    f"{' '.join(command)}: exit code {code}; its section stays as it was",
                    file=sys.stderr,
                )
                failed = failed or code
                continue
        write(PAGE, name, Measured(shlex.join(command), printed, day, machine()))
        print(f"{PAGE.relative_to(ROOT)}: {SECTIONS[name]}", file=sys.stderr)
    for line in targets(PAGE.read_text(encoding="utf-8")):
        print(line)
    return failed


def targets(page: str) -> list[str]:
    """Return the lines of a page that say whether a target is met, each after its section."""
    of_one = re.compile(r"\btarget\b.*: (met|missed)\b|\d  +(met|missed)\b", re.IGNORECASE)
    return [
        f"{heading}: {line.strip()}"
        for heading, text in split(page)[1].items()
        for line in text.splitlines()
        if of_one.search(line)
    ]


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
    parts = [
        before or INTRO.strip(),
        *(f"## {heading}\n\n{text}" for heading, text in everything.items()),
    ]
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
    return "\n".join(first).strip(), {
        heading: "\n".join(lines).strip() for heading, lines in others
    }


def section(name: str, measured: Measured, before: str = "") -> str:
    """Return what a benchmark measures and its output; the machine only if the page's first text does not name it."""
    lines = measured.output.replace(str(ROOT), ".").strip("\n").splitlines()
    printed = "\n".join(line.rstrip() for line in lines)
    longest = max((len(ticks) for ticks in re.findall(r"`{3,}", printed)), default=2)
    fence = "`" * (longest + 1)
    where = "" if measured.machine in " ".join(before.split()) else f", on {measured.machine}"
    return f"{description(name)}\n\n`{measured.command}`, {measured.date}{where}:\n\n{fence}text\n{printed}\n{fence}"


def description(name: str) -> str:
    """Return the first paragraph of a benchmark's docstring."""
    text = (
        ast.get_docstring(
            ast.parse((ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8"))
        )
        or ""
    )
    return text.partition("\n\n")[0]


def machine() -> str:
    """Return processor, features, memory and versions, without a name that identifies the machine."""
    info = _processor_information()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    features = [name for name, some in PROCESSOR_FEATURES.items() if flags & set(some)]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "ray"))
    return (
        f"{os.cpu_count()} cores ({info.get('model name') or platform.machine()};"
        f" {', '.join(features) or 'no known vector extensions'}"
        f"{'' if 'bfloat16' in features else '; no native bfloat16'}), {memory:.0f} GiB,"
        f" Python {platform.python_version()}, {versions}"
    )


def _processor_information() -> Mapping[str, str]:
    file = Path("/proc/cpuinfo")
    first = file.read_text().partition("\n\n")[0] if file.exists() else ""
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _arguments(argv: Sequence[str]) -> tuple[list[str], list[str], Path | None]:
    own = list(argv[: argv.index("--")] if "--" in argv else argv)
    options = list(argv[len(own) + 1 :])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"one of {', '.join(SECTIONS)}; default: all that can run here, without {', '.join(NAMED_ONLY)}",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="saved output of this machine; runs nothing"
    )
    args = parser.parse_args(own)
    if unknown := [name for name in args.names if name not in SECTIONS]:
        parser.error(f"{unknown[0]}: not one of {', '.join(SECTIONS)}")
    if (options or args.output) and len(args.names) != 1:
        parser.error("--output and options after -- need the name of one benchmark")
    return args.names, options, args.output


def _all() -> list[str]:
    import torch

    left_out = NAMED_ONLY if torch.cuda.is_available() else NAMED_ONLY + NEEDS_GPU
    return [name for name in SECTIONS if name not in left_out]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
