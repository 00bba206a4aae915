"""Cost of Ray during training: the training loop in Ray Train beside the same loop under torchrun.

Both train the same config on the same token store with the same code (cluster/worker.py). One is
pipelines/finetune.py as a user runs it, with driver, progress, MLflow and checkpoints. The other consists of
processes that torchrun starts; they run the same Worker, but report to nobody. There are two times per step: the
worker's own measurement, and the time between two checkpoints divided by the steps between them. The second one also
contains the work between steps, and the ratio uses it. The first steps do not count. SmolLM2-135M; both run in turn,
and medians count. Run it on an idle machine: on two cores Ray's processes share the cores with the workers, as they
do for a user. The last column is the share of the machine's CPU time that other processes than the workers use; it
varies less than the steps.

    python benchmarks/overhead.py [--rounds 3] [--steps 40] [--workers 2]
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import numpy as np
from common import MODEL, machine, met, model_folder, processes_below, table

from olora_ray.cluster.spec import TrainResult
from olora_ray.common import records
from olora_ray.train.checkpoint import MANIFEST
from olora_ray.train.checkpoints import name_of

ROOT = Path(__file__).resolve().parent.parent
UNDER_TORCHRUN = str(Path(__file__).with_name("under_torchrun.py"))
MOST_OVERHEAD, MOST_WAITING = 0.03, 0.01
LOOK_EVERY = 1.0
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Run:
    """The records of a run, without its first steps."""

    step: float
    """Mean seconds of a step."""
    whole: float
    """Mean seconds from one step to the next."""
    waiting: float
    """Share of the steps' time that workers waited for data."""
    others: float = math.nan
    """Share of the machine's CPU time that other processes than the workers used; nan: not measured."""


@dataclass(frozen=True)
class Busy:
    time: float
    all: float
    workers: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=40, help="steps; the first quarter does not count"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--storage", default="./runs", help="folder for the dequantised model")
    args = parser.parse_args()
    model_folder(args.model, args.storage)
    Path(args.storage, "models").mkdir(parents=True, exist_ok=True)
    print(machine())
    runs: dict[str, list[Run]] = {"Ray Train": [], "torchrun": []}
    with tempfile.TemporaryDirectory(dir=args.storage) as scratch:
        storage = Path(scratch).resolve()
        (storage / "models").symlink_to(Path(args.storage).resolve() / "models")
        write_corpus(storage / "corpus.jsonl", rows=args.steps * 16)
        for turn in range(args.rounds):
            # Ray's run comes first, because it writes the token store that both read.
            for name in runs:
                file = settings(storage, f"{name.split()[0].lower()}-{turn}", args)
                seen = run(name, file, args.workers)
                runs[name].append(recorded(storage / file.stem, args.steps, seen))
                print(
                    f"round {turn + 1}: {name}: {runs[name][-1].whole:.3f} s a step",
                    file=sys.stderr,
                    flush=True,
                )
    print(runs_table(runs))
    print(verdict(runs))


def write_corpus(file: Path, rows: int) -> None:
    generator = np.random.default_rng(0)
    words = [
        "".join(chr(97 + c) for c in generator.integers(0, 26, n))
        for n in generator.integers(2, 10, 5_000)
    ]
    with file.open("w") as out:
        for _ in range(rows):
            ask, answer = (
                " ".join(words[i] for i in generator.integers(0, len(words), int(count)))
                for count in np.clip(generator.lognormal(np.log(20), 0.5, 2), 4, 40)
            )
            messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": messages}) + "\n")


def settings(storage: Path, name: str, args: argparse.Namespace) -> Path:
    tree = {
        "run": {"name": name, "storage": str(storage)},
        "model": {"name": args.model},
        "data": {"train": [{"path": str(storage / "corpus.jsonl")}], "max_length": 512},
        "train": {
            "steps": args.steps,
            "global_batch": 2 * args.workers,
            "micro_batch": 1,
            "schedule": "constant",
            "checkpoint_every": counted_from(args.steps),
            "keep": 99,
            "log_every": 5,
            "activation_checkpointing": False,  # not decided by the memory that is free: it has to be the same for both
        },
        "cluster": {"workers": args.workers, "cpus_per_worker": 1},
        "evaluation": {"samples": 0},
        "export": {"merged": False},
    }
    file = storage / f"{name}.yaml"
    file.write_text(json.dumps(tree))  # JSON is YAML
    return file


def run(name: str, file: Path, workers: int) -> list[Busy]:
    command, environment = [sys.executable, "pipelines/finetune.py", str(file)], dict(os.environ)
    if name == "torchrun":
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
        command = [sys.executable, *launch, UNDER_TORCHRUN, str(file)]
        environment["OMP_NUM_THREADS"] = "1"  # as Ray sets it for a worker with one CPU
    seen = list[Busy]()
    with subprocess.Popen(command, cwd=ROOT, stdout=sys.stderr, env=environment) as process:
        while process.poll() is None:
            seen.append(
                busy(
                    process.pid,
                    "RayTrainWorker" if name == "Ray Train" else f"-u\0{UNDER_TORCHRUN}",
                )
            )
            time.sleep(LOOK_EVERY)
    if process.returncode:
        raise SystemExit(f"{name}: the run has failed")
    return seen


def busy(ancestor: int, worker: str) -> Busy:
    user, nice, system, *_ = map(int, Path("/proc/stat").read_text().split(maxsplit=4)[1:4])
    found = 0
    for process in processes_below(ancestor, worker):
        with suppress(OSError):  # gone meanwhile
            fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
            found += int(fields[11]) + int(fields[12])  # user and system, see proc_pid_stat(5)
    return Busy(time.time(), (user + nice + system) / TICKS, found / TICKS)


def taken_by_others(seen: Sequence[Busy], began: float, ended: float) -> float:
    """Return the share of the CPU time between two times that other processes used; nan if too short."""
    within = [each for each in seen if began <= each.time <= ended]
    if len(within) < 2:
        return math.nan
    first, last = within[0], within[-1]
    taken = last.all - first.all - (last.workers - first.workers)
    return taken / (last.time - first.time) / (os.cpu_count() or 1)


def recorded(folder: Path, steps: int, seen: Sequence[Busy] = ()) -> Run:
    """Read the records in a run folder, from the first counted checkpoint to the last one."""
    first = counted_from(steps)
    result = records.read(str(folder / "training.json"), TrainResult)
    assert result is not None
    assert result.state is not None
    rows = [
        row for row in result.state.history if row["step"] > first and "train/step_seconds" in row
    ]
    assert len(rows) == steps - first, "a step is missing: was the run resumed?"
    seconds = [row["train/step_seconds"] for row in rows]
    began, ended = (
        (folder / "checkpoints" / name_of(step) / MANIFEST).stat().st_mtime
        for step in (first, steps)
    )
    waited = sum(row["data/wait_fraction"] * row["train/step_seconds"] for row in rows)
    others = taken_by_others(seen, began, ended)
    return Run(mean(seconds), (ended - began) / (steps - first), waited / sum(seconds), others)


def counted_from(steps: int) -> int:
    return max(1, steps // 4)


def runs_table(runs: dict[str, list[Run]]) -> str:
    rows = [
        (
            name,
            f"{median(each.step for each in done):.3f}",
            f"{median(each.whole for each in done):.3f}",
            f"{min(each.whole for each in done):.3f} to {max(each.whole for each in done):.3f}",
            f"{median(each.waiting for each in done):.2%}",
            f"{median(each.others for each in done):.1%}",
        )
        for name, done in runs.items()
    ]
    return table(
        ("", "a step s", "step to step s", "all rounds", "waiting for data", "others' processors"),
        rows,
    )


def verdict(runs: dict[str, list[Run]]) -> str:
    pairs = [
        mine.whole / other.whole - 1
        for mine, other in zip(runs["Ray Train"], runs["torchrun"], strict=True)
    ]
    over, waiting = median(pairs), median(each.waiting for each in runs["Ray Train"])
    return (
        f"seconds per step with Ray Train, compared with torchrun: {over:+.1%} (pairs from {min(pairs):+.1%} to"
        f" {max(pairs):+.1%}; target below {MOST_OVERHEAD:.0%}: {met(over < MOST_OVERHEAD)}); share of the time that"
        f" waits for data: {waiting:.2%} (target below {MOST_WAITING:.0%}: {met(waiting < MOST_WAITING)})"
    )


if __name__ == "__main__":
    main()
