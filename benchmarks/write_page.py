"""Runs the benchmarks, one after the other, and writes what they print to docs/generated/benchmarks.md.

    python benchmarks/write_page.py                          (make bench)
    python benchmarks/write_page.py init throughput          these only
    python benchmarks/write_page.py recovery -- --kills 5    one of them, with options of its own
    python benchmarks/write_page.py early --output FILE      one of them, from what it has printed before

Each has a section with the date, the machine and the command. Sections of benchmarks that did not run stay as they
are, word for word, and so does text before the first section. The page is written after each benchmark, and one that
fails does not keep the others from running. All together are planned for 90 minutes on two cores: some run with fewer
rounds then than alone, and those that take longest only when they are named.
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
    "recovery": "Recovery",
    "early": "Early start",
    "sweep": "Sweep",
    "export": "Export",
    "sharded": "Sharded base",
    "tree": "Gradient tree",
    "memory": "Memory plan",
    "quantised": "Quantised base",
    "prepare": "Preparation",
    "scale": "A billion rows",
    "soak": "Soak",
}
"""Script -> heading, in the order of the page."""
NEEDS_GPU = ("gpu",)
"""Left out where there is no GPU, unless they are named."""
NAMED_ONLY = ("recovery", "early", "sweep", "soak")
"""Left out unless they are named: they take twenty minutes and more each."""
TOGETHER = {
    "throughput": ("--rows", "32", "--rounds", "2"),
    "roofline": ("--rounds", "2"),
    "start": ("--rounds", "3", "--no-search"),
    "overhead": ("--steps", "8", "--rounds", "2"),
    "scaling": ("--steps", "3"),
    "tree": ("--pairs", "5"),
    "quantised": ("--steps", "8"),
    "prepare": ("--rows", "30000", "--rounds", "2"),
}
"""Options of those that take less time when all run."""
INTRO = """\
# Benchmarks

`make bench` runs these and writes what they print, with the date and the machine of each;
`python benchmarks/write_page.py NAME` runs one, and leaves the other sections as they are. Compare ratios within a
table, not seconds between machines.
"""
MISSING = "Not measured yet."
PROCESSOR_FEATURES = {
    "bfloat16": ("avx512_bf16", "amx_bf16", "bf16"),
    "AMX": ("amx_tile",),
    "AVX-512": ("avx512f",),
    "AVX2": ("avx2",),
}
"""What is shown of a processor -> the flags of /proc/cpuinfo, of which one is enough; bf16 is Arm's."""


@dataclass(frozen=True)
class Measured:
    """What a benchmark printed, and under which circumstances."""

    command: str
    output: str
    date: str
    machine: str


def main(argv: Sequence[str]) -> int:
    """Run and write; the exit code of the first benchmark that has failed."""
    names, options, output = _arguments(argv)
    failed = 0
    for name in names or _all():
        command = ["python", f"benchmarks/{name}.py", *(options if names else TOGETHER.get(name, ()))]
        if output:
            printed = output.read_text(encoding="utf-8")
            day = time.strftime("%Y-%m-%d", time.localtime(output.stat().st_mtime))
        else:
            printed, code = run([sys.executable, *command[1:]])
            day = time.strftime("%Y-%m-%d")
            if code:
                print(f"{' '.join(command)}: exit code {code}; its section stays as it was", file=sys.stderr)
                failed = failed or code
                continue
        write(PAGE, name, Measured(shlex.join(command), printed, day, machine()))
        print(f"{PAGE.relative_to(ROOT)}: {SECTIONS[name]}", file=sys.stderr)
    return failed


def run(command: Sequence[str]) -> tuple[str, int]:
    """(what a command prints, its exit code); it is shown meanwhile."""
    lines = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return "".join(lines), process.returncode


def write(page: Path, name: str, measured: Measured) -> None:
    """Put what was measured into the page, which is written whole or not at all."""
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    aside = page.with_name(f".{page.name}.new")
    aside.write_text(renewed(old, name, measured), encoding="utf-8")
    aside.replace(page)


def renewed(old: str, name: str, measured: Measured) -> str:
    """The page with one section anew, and all others as they were."""
    before, sections = split(old)
    sections[SECTIONS[name]] = section(name, measured)
    everything = dict.fromkeys(SECTIONS.values(), MISSING) | sections
    parts = [before or INTRO.strip(), *(f"## {heading}\n\n{text}" for heading, text in everything.items())]
    return "\n\n".join(parts) + "\n"


def split(page: str) -> tuple[str, dict[str, str]]:
    """(text before the first section, heading -> text of its section); headings within fences are none."""
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
    return "\n".join(first).strip(), {heading: "\n".join(lines).strip() for heading, lines in others}


def section(name: str, measured: Measured) -> str:
    """The text of a benchmark's section."""
    lines = measured.output.replace(str(ROOT), ".").strip("\n").splitlines()
    printed = "\n".join(line.rstrip() for line in lines)
    longest = max((len(ticks) for ticks in re.findall(r"`{3,}", printed)), default=2)
    fence = "`" * (longest + 1)
    return (
        f"{description(name)}\n\n`{measured.command}`, {measured.date}, on {measured.machine}:\n\n"
        f"{fence}text\n{printed}\n{fence}"
    )


def description(name: str) -> str:
    """What a benchmark measures: its docstring up to the commands."""
    text = ast.get_docstring(ast.parse((ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8"))) or ""
    return text.partition(f"\n    python benchmarks/{name}.py")[0].strip()


def machine() -> str:
    """Processor, its features, memory and versions; no name by which the machine could be found."""
    info = _processor_information()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    features = [name for name, some in PROCESSOR_FEATURES.items() if flags & set(some)]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "ray"))
    return (
        f"{os.cpu_count()} cores ({info.get('model name') or platform.machine()};"
        f" {', '.join(features) or 'no vector extensions that are known here'}"
        f"{'' if 'bfloat16' in features else '; no native bfloat16'}), {memory:.0f} GiB,"
        f" Python {platform.python_version()}, {versions}"
    )


def _processor_information() -> Mapping[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    file = Path("/proc/cpuinfo")
    first = file.read_text().partition("\n\n")[0] if file.exists() else ""
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _arguments(argv: Sequence[str]) -> tuple[list[str], list[str], Path | None]:
    """(names; none: all that can run; options of the one benchmark; file of its output)."""
    own = list(argv[: argv.index("--")] if "--" in argv else argv)
    options = list(argv[len(own) + 1 :])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"of {', '.join(SECTIONS)}; none: all that can run here, but {', '.join(NAMED_ONLY)}",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="what it has printed on this machine; runs nothing")
    args = parser.parse_args(own)
    if unknown := [name for name in args.names if name not in SECTIONS]:
        parser.error(f"{unknown[0]}: not one of {', '.join(SECTIONS)}")
    if (options or args.output) and len(args.names) != 1:
        parser.error("--output and options after -- are for one benchmark: name it")
    return args.names, options, args.output


def _all() -> list[str]:
    """Those that can run here and take no long time."""
    import torch

    left_out = NAMED_ONLY if torch.cuda.is_available() else NAMED_ONLY + NEEDS_GPU
    return [name for name in SECTIONS if name not in left_out]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
