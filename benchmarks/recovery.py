"""Cost of fault tolerance: checkpoints during training, and the time until a run trains again after a failure.

The model and the batch are those of the quickstart. Checkpoints: one process with all threads runs blocks of ten
steps, in turn with and without a checkpoint written meanwhile; the share is the median over the pairs. Failures:
pipelines/finetune.py trains with two workers, and one event after the other hits it, always in the middle of a step.
Each line has the median of the seconds until the next step is done, or until the event that it names. For a host the
time runs from its `ray start`, or from the end of `ray drain-node`, to the first step of the new group.
"before": 14 s was measured when a lost worker restarted all workers; 51 and 47 s are the advantage of untouched runs.
"a step" is the time of a step just before the event. "steps again" and "longest gap" (seconds between two steps until
all is as before) are maxima. Run it on an idle machine, as root.

    python benchmarks/recovery.py [--rounds 7] [--kills 3]
"""

import argparse
import signal
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from back_at_work import Case, Sample, measure, targets
from common import MODEL, config, machine, memory_store, model_folder, our_trainer, table

from olora_ray.model.folder import parameters
from olora_ray.train.checkpoint import TrainState
from olora_ray.train.checkpoints import CheckpointManager, name_of
from olora_ray.train.loader import Schedule, StepLoader

BLOCK, LENGTH = 10, 384


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=7,
        help="pairs of blocks with and without a checkpoint; 0: none",
    )
    parser.add_argument(
        "--kills",
        type=int,
        default=3,
        help="repetitions of each event, SIGSTOP in every third; 0: none",
    )
    parser.add_argument("--storage", default="./runs", help="folder for the dequantised model")
    args = parser.parse_args()
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # what was started is removed then, too
    folder = model_folder(MODEL, args.storage)
    print(machine())
    with tempfile.TemporaryDirectory(dir=args.storage) as scratch:
        if args.rounds:
            _print_checkpoints(Path(scratch), folder, args.rounds)
        if args.kills:
            found: dict[Case, list[Sample]] = {}
            try:
                measure(
                    Path(scratch).resolve(),
                    Path(args.storage).resolve() / "models",
                    args.kills,
                    found,
                )
            finally:  # what is ended early has measured something too
                print(targets(found))


def _print_checkpoints(scratch: Path, folder: str, rounds: int) -> None:
    found = checkpoints(scratch, folder, rounds)
    count = parameters(folder)
    trained = found["bytes"]
    rows = [
        ("with a checkpoint", f"{found['with']:.2f}", f"{found['cpu with']:.2f}"),
        ("without", f"{found['without']:.2f}", f"{found['cpu without']:.2f}"),
    ]
    print(table((f"{BLOCK} steps", "seconds", "CPU seconds"), rows))
    print(
        f"share of the training time at checkpoint_every {BLOCK}: {found['share']:+.1%} (pairs from"
        f" {found['least']:+.1%} to {found['most']:+.1%}); the training thread stands still for"
        f" {found['blocked'] * 1000:.0f} ms, {found['blocked'] / found['without']:.2%}"
    )
    print(f"a checkpoint is written in {found['write']:.2f} s, in the background, fsync included")
    print(
        f"a checkpoint takes {trained / 1e6:.0f} MB; one of the full model with AdamW's moments in float32 would take"
        f" {count * 12 / 1e6:,.0f} MB, {count * 12 / trained:.0f} times as much"
    )


def checkpoints(scratch: Path, folder: str, rounds: int) -> dict[str, float]:
    cfg = config(
        str(scratch),
        {"name": folder},
        train={"global_batch": 2, "micro_batch": 1, "steps": 10**6, "schedule": "constant"},
        cluster={"workers": 1},
    )
    trainer, attention = our_trainer(cfg, folder)
    generator = np.random.default_rng(0)
    rows = [
        (generator.integers(3, 40_000, 96, dtype=np.int32), np.arange(96) >= 60) for _ in range(400)
    ]
    store = memory_store(rows, LENGTH)
    steps = trainer.steps(StepLoader(store, cfg.train, 0, attention), 0, Schedule(cfg.train, store))
    files = CheckpointManager(str(scratch / "checkpoints"), 2)
    block(steps, None, trainer, 0)
    taken: dict[str, list[dict[str, float]]] = {"with": [], "without": []}
    for turn in range(rounds):
        for kind in ("with", "without") if turn % 2 else ("without", "with"):
            taken[kind].append(block(steps, files if kind == "with" else None, trainer, turn + 1))
    began = time.perf_counter()
    files.save(rounds + 1, written_state(trainer, rounds + 1))
    files.finish()
    written = time.perf_counter() - began
    newest = scratch / "checkpoints" / name_of(rounds + 1)
    shares = [
        a["seconds"] / b["seconds"] - 1
        for a, b in zip(taken["with"], taken["without"], strict=True)
    ]
    middle = {
        kind: {key: median(run[key] for run in runs) for key in runs[0]}
        for kind, runs in taken.items()
    }
    return {
        "with": middle["with"]["seconds"],
        "without": middle["without"]["seconds"],
        "cpu with": middle["with"]["cpu"],
        "cpu without": middle["without"]["cpu"],
        "blocked": middle["with"]["blocked"],
        "share": median(shares),
        "least": min(shares),
        "most": max(shares),
        "write": written,
        "bytes": sum(file.stat().st_size for file in newest.iterdir()),
    }


def block(
    steps: Iterator[Any], files: CheckpointManager | None, trainer: Any, number: int
) -> dict[str, float]:
    """Run ten steps, the first with a checkpoint if asked; the block ends when that is on the disk."""
    start, used, blocked = time.perf_counter(), time.process_time(), 0.0
    next(steps)
    if files:
        began = time.perf_counter()
        files.save(number, written_state(trainer, number))
        blocked = time.perf_counter() - began
    for _ in islice(steps, BLOCK - 1):
        pass
    if files:
        files.finish()
    return {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - used,
        "blocked": blocked,
    }


def written_state(trainer: Any, step: int) -> Any:
    """Return the largest state of a checkpoint: with a best adapter of an earlier step."""
    return trainer.snapshot(TrainState(step), trainer.flat.vector.clone(), {}, "")


if __name__ == "__main__":
    main()
