"""Runs readers over their inputs in processes that may hang, fill their memory or die, and counts what came of it."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

READERS = tuple(
    sorted(file.stem for file in (Path(__file__).parent / "readers").glob("*.py") if not file.stem.startswith("_"))
)
LATE = 10.0
"""Seconds of a processor for one input: on a busy machine as many as on an idle one."""
_LONGEST, _START = 120.0, 300.0
"""Seconds on the clock for one input, and until a process has imported what its reader needs."""
COLUMNS = ("ok", "refused", "traceback", "late", "large", "wrong")
BAD = ("traceback", "late", "large", "wrong")


@dataclass
class Counts:
    """What came of a reader's inputs."""

    kinds: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    """One line for each input that is neither read nor refused as it should be."""
    seconds: float = 0.0

    def add(self, found: Mapping[str, Any]) -> None:
        """Count the outcome of one input."""
        self.kinds[found["kind"]] += 1
        self.seconds += found.get("seconds", 0.0)
        if found["kind"] in BAD:
            self.bad.append(f"{found['reader']} {found['number']}: {found['kind']}: {found.get('message', '')}")


def run(folder: Path, counts: Mapping[str, int], seed: int = 1) -> dict[str, Counts]:
    """Read `counts[name]` inputs of each reader."""
    found = {name: Counts() for name in counts}
    jobs = {name: (0, stop) for name, stop in counts.items()}
    while jobs:
        left = _process(folder, seed, jobs, found)
        assert left != jobs or not left, f"no input was read: see {folder}/stderr.txt"
        jobs = left
    return found


def _process(
    folder: Path, seed: int, jobs: dict[str, tuple[int, int]], found: dict[str, Counts]
) -> dict[str, tuple[int, int]]:
    """One process, until it is done, or an input has ended it; returns what is left."""
    jobs = dict(jobs)
    words = [f"{name}:{start}:{stop}" for name, (start, stop) in jobs.items()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "TOKENIZERS_PARALLELISM": "false"}
    with (folder / "stderr.txt").open("ab") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.child", str(folder), str(seed), *words],
            stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        try:
            current = _follow(process, jobs, found)
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
    if current is None and process.returncode not in (0, -9):
        said = (folder / "stderr.txt").read_text(errors="replace")[-800:]
        raise RuntimeError(f"{words}: ended between two inputs: {said}")
    return {name: (start, stop) for name, (start, stop) in jobs.items() if start < stop}


def _follow(
    process: "subprocess.Popen[str]", jobs: dict[str, tuple[int, int]], found: dict[str, Counts]
) -> dict[str, Any] | None:
    """Take in what a process says; returns the input that has ended it, if one has."""
    lines: queue.Queue[str | None] = queue.Queue()
    assert process.stdout is not None
    threading.Thread(target=_pump, args=(process.stdout, lines), daemon=True).start()
    current: dict[str, Any] | None = None
    begun, worked = time.monotonic(), 0.0
    while True:
        try:
            line = lines.get(timeout=1.0)
        except queue.Empty:
            waited = time.monotonic() - begun
            if waited < _START if current is None else waited < _LONGEST and _seconds(process.pid) - worked < LATE:
                continue
            return _ended(current, "late", jobs, found)
        if line is None:
            process.wait(10)
            return _ended(current, "large" if process.returncode else "ok", jobs, found)
        said = json.loads(line)
        if "kind" not in said:
            current, begun, worked = said, time.monotonic(), _seconds(process.pid)
            continue
        found[said["reader"]].add(said)
        jobs[said["reader"]] = (said["number"] + 1, jobs[said["reader"]][1])
        current, begun = None, time.monotonic()


def _seconds(pid: int) -> float:
    """What a process has used of a processor."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended: its last line says more
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _ended(
    current: dict[str, Any] | None, kind: str, jobs: dict[str, tuple[int, int]], found: dict[str, Counts]
) -> Any:
    if current is not None:
        found[current["reader"]].add(
            {**current, "kind": kind, "message": "ended the process" if kind == "large" else ""}
        )
        jobs[current["reader"]] = (current["number"] + 1, jobs[current["reader"]][1])
    return current


def _pump(stream: Any, lines: "queue.Queue[str | None]") -> None:
    with contextlib.suppress(ValueError):  # it is closed while it is read, after the process was ended
        for line in stream:
            lines.put(line)
    lines.put(None)


def table(found: Mapping[str, Counts]) -> str:
    """The counts as the table of DEFECTS."""
    rows = [
        "| reader | inputs | ok | refused | tracebacks | late | memory | wrong |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, counts in found.items():
        cells = [sum(counts.kinds.values()), *(counts.kinds[kind] for kind in COLUMNS)]
        rows.append(f"| {name.replace('_', ' ')} | {' | '.join(f'{cell:,}' for cell in cells)} |")
    return "\n".join(rows)
