"""Gains of a search from shared work, from stopping trials early, and from several adapters on one base model.

The model and the corpus are those of the quickstart, with short trials and 10 held-out rows. The trials vary rank,
alpha and the multiple of the automatic rate. The three tables come from runs of pipelines/sweep.py and
pipelines/finetune.py on this machine, one after the other:

  1. seconds from the start of a trial to its first step, with and without sharing. Without it, a trial is a separate
     run of finetune.py that prepares its tokens, initialises its adapter and evaluates the base model;
  2. the same trials with and without the default rule that stops trials early: total time, and the best loss of both
     (target: at most 0.35 of the time);
  3. the same trials, k adapters on one base model or each adapter in its own worker: time, and the peak memory of all
     processes of Ray together. `--adapters 1` leaves this out.

    python benchmarks/sweep.py [--trials 16] [--steps 20] [--adapters 4]
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import yaml
from common import machine, met, table

ROOT = Path(__file__).resolve().parent.parent
Space = dict[str, Any]
"""Content of a space file."""
CONFIG = "pipelines/configs/quickstart.yaml"
HELD_OUT = 10
MOST = 0.35
"""Target for the time of a search, as a share of that of all trials to the end."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--adapters", type=int, default=4, help="adapters per base model in the third table"
    )
    parser.add_argument("--storage", default="./runs", help="folder for the dequantised model")
    args = parser.parse_args()
    print(machine())
    Path(args.storage, "models").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.storage) as scratch:
        bench = Bench(Path(scratch), Path(args.storage).resolve(), args.trials, args.steps)
        alone = bench.alone()
        early = bench.search("early", scheduler=None, adapters=1)
        full = bench.search("full", scheduler="none", adapters=1)
        shared = (
            bench.search("shared", scheduler="none", adapters=args.adapters)
            if args.adapters > 1
            else None
        )
    rows = [
        ("a run of its own (finetune.py)", f"{alone:.1f}", "1.00"),
        (
            "a trial with shared tokens, factors, baseline",
            f"{full.first:.1f}",
            f"{full.first / alone:.2f}",
        ),
    ]
    if shared:
        rows.append(
            (
                f"the same, {args.adapters} on one base",
                f"{shared.first:.1f}",
                f"{shared.first / alone:.2f}",
            )
        )
    print(table(("start to first step", "seconds", "ratio"), rows))
    print(f"\nspared a trial, as the search counts it: {full.spared:.1f} s\n")
    ratio = early.seconds / full.seconds
    rows = [
        ("all to the end", f"{full.seconds:.0f}", "1.00", f"{full.best:.4f}", f"{full.steps}"),
        (
            "stopped early",
            f"{early.seconds:.0f}",
            f"{ratio:.2f}",
            f"{early.best:.4f}",
            f"{early.steps}",
        ),
    ]
    print(
        table(
            (
                f"{args.trials} trials of {args.steps} steps",
                "seconds",
                "ratio",
                "best loss",
                "steps",
            ),
            rows,
        )
    )
    print(
        f"stopped early: {ratio:.2f} times the seconds of all to the end, target {MOST:g}: {met(ratio <= MOST)}"
    )
    if shared is None:
        return
    print()
    rows = [
        (
            "each in a worker of its own",
            f"{full.seconds:.0f}",
            "1.00",
            f"{full.peak:,.0f}",
            f"{full.best:.4f}",
        ),
        (
            f"{args.adapters} adapters on each base",
            f"{shared.seconds:.0f}",
            f"{shared.seconds / full.seconds:.2f}",
            f"{shared.peak:,.0f}",
            f"{shared.best:.4f}",
        ),
    ]
    print(
        table(
            (f"{args.trials} trials, no scheduler", "seconds", "ratio", "peak MB", "best loss"),
            rows,
        )
    )


@dataclass(frozen=True)
class Found:
    seconds: float
    """Seconds from the start of the first trial to the end of the last one."""
    first: float
    """Median seconds from the start of a trial to its first step."""
    spared: float
    best: float
    steps: int
    """Optimizer steps of all trials."""
    peak: float
    """Peak of the resident memory of all processes, in MB."""


class Bench:
    def __init__(self, scratch: Path, storage: Path, trials: int, steps: int) -> None:
        self.scratch, self.storage, self.trials, self.steps = scratch, storage, trials, steps
        self.held_out = scratch / "heldout.jsonl"
        lines = (ROOT / "pipelines" / "quickstart" / "heldout.jsonl").read_text().splitlines()
        self.held_out.write_text("\n".join(lines[:HELD_OUT]) + "\n")

    def search(self, name: str, scheduler: str | None, adapters: int) -> Found:
        file = self.scratch / f"{name}.yaml"
        file.write_text(yaml.safe_dump(self._space(scheduler, adapters)))
        storage = self._storage(name)
        command = [sys.executable, "pipelines/sweep.py", CONFIG, str(file), *self._changes(storage)]
        lines, peak = run(command)
        found = json.loads((storage / f"quickstart-{name}" / "leaderboard.json").read_text())
        spared = next(line for line in lines if "each trial is spared" in line)
        values = [trial["value"] for trial in found["trials"] if trial["value"] is not None]
        return Found(
            seconds=found["seconds"],
            first=median(trial["first_step"] for trial in found["trials"] if trial["first_step"]),
            spared=float(re.findall(r"spared ([\d.]+) s", spared)[0]),
            best=min(values),
            steps=sum(trial["step"] for trial in found["trials"]),
            peak=peak,
        )

    def alone(self) -> float:
        """Return seconds from the start of Ray's work in a single run to its first step, without prepared tokens."""
        storage = self._storage("alone")
        changes = [
            f"train.steps={self.steps}",
            "train.log_every=1",
            "registry.model=null",
            "evaluation.scorer=null",
        ]
        command = [
            sys.executable,
            "pipelines/finetune.py",
            CONFIG,
            *self._changes(storage),
            *changes,
        ]
        lines, _ = run([*command, "evaluation.samples=0"])
        begun = next(line for line in lines if " ray: " in line)
        first = next(line for line in lines if "step 1/" in line)
        return seconds_of(first) - seconds_of(begun)

    def _space(self, scheduler: str | None, adapters: int) -> Space:
        every = self.steps // 3
        return {
            "search": {
                "adapter.rank": {"choice": [8, 16, 32, 64]},
                "adapter.alpha": {"of": "adapter.rank", "times": [1, 2, 4]},
                "train.lr_factor": {"choice": [0.5, 1, 2]},
            },
            "set": {
                "train.steps": self.steps,
                "train.eval_every": every,
                "train.checkpoint_every": every,
                "evaluation.scorer": None,
                "evaluation.samples": 0,
            },
            **({"scheduler": {"kind": scheduler}} if scheduler else {}),
            "trials": self.trials,
            "trials_per_worker": adapters,
        }

    def _storage(self, name: str) -> Path:
        storage = self.scratch / name
        storage.mkdir()
        (storage / "models").symlink_to(self.storage / "models")
        return storage

    def _changes(self, storage: Path) -> list[str]:
        return [
            f"run.storage={storage}",
            "cluster.workers=1",
            f"tracking.uri=sqlite:///{storage}/mlflow.db",
            f"data.eval=[{{path: {self.held_out.resolve()}}}]",
        ]


def run(command: list[str]) -> tuple[list[str], float]:
    """Run a command; return (its lines, peak memory of its processes in MB)."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    peak = [0.0]
    watch = threading.Thread(target=_watch, args=(process, peak), daemon=True)
    watch.start()
    assert process.stdout
    lines = process.stdout.read().splitlines()
    if process.wait():
        raise SystemExit("\n".join([*lines[-20:], f"{command[1]} failed"]))
    watch.join()
    return lines, peak[0]


def seconds_of(line: str) -> float:
    hours, minutes, seconds = line.split()[0].split(":")
    return int(hours) * 3600 + int(minutes) * 60 + int(seconds)


def _watch(process: "subprocess.Popen[str]", peak: list[float]) -> None:
    while process.poll() is None:
        total = 0
        try:
            for one in psutil.Process(process.pid).children(recursive=True):
                total += getattr(one.memory_full_info(), "pss", 0)
        except psutil.Error:
            pass
        peak[0] = max(peak[0], total / 1e6)
        time.sleep(2)


if __name__ == "__main__":
    main()
