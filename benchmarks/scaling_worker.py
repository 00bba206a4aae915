"""A worker of benchmarks/scaling.py: initialisation, steps, exchange and a checkpoint, each measured alone.

python benchmarks/scaling_worker.py JOB        (json; scaling.py starts it)
"""

import json
import os
import sys
import time
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import memory_store, our_trainer
from contestants import LONGEST, RANK, Setting, join, make_rows, our_config
from recovery import written_state

from olora_ray.adapter.initialise import InitReport, initialise, options_of
from olora_ray.adapter.inject import find_targets
from olora_ray.common import collectives
from olora_ray.common.logs import quiet_transformers
from olora_ray.config.schema import Config
from olora_ray.model.load import load_model
from olora_ray.train.checkpoints import CheckpointManager
from olora_ray.train.loader import Schedule, StepLoader
from olora_ray.train.loop import Trainer
from olora_ray.train.tree import TreeSum

CPU = torch.device("cpu")
REPEATS = 5
"""Repetitions of an exchange; the median counts."""


def main() -> None:
    quiet_transformers()
    job = json.loads(sys.argv[1])
    setting = Setting("ours", "ours", workers=job["workers"], micro=job["micro"])
    join(setting, job)
    settings = our_config(job, setting, job["workers"] * job["micro"] * job["accumulated"])
    # The start of a worker is the time until now plus the following load, with the base model in the page cache.
    report, shapes, loaded = initialisation(settings, job["folder"])
    found: dict[str, Any] = {
        "start": loaded - job["launched"],
        "factors": report.seconds,
        "factor exchange": report.exchange_seconds,
        "shapes": shapes,
    }
    trainer, attention = our_trainer(settings, job["folder"])
    found |= steps(trainer, attention, settings, job)
    found |= exchanges(trainer.gradient)
    if job["rank"] == 0:
        found |= checkpoint(trainer, Path(job["scratch"]))
    print("\n" + json.dumps(found), flush=True)


def initialisation(
    settings: Config, folder: str
) -> tuple[InitReport, dict[str, tuple[int, ...]], float]:
    """Return the report of a second initialisation with warm caches, the shapes, and the load time."""
    model: Any = load_model(folder, settings.model, CPU)
    loaded = time.time()
    targets = find_targets(model, settings.adapter.targets, RANK)
    for _ in range(2):
        _, report = initialise(targets, "olora", RANK, 0, CPU, options_of(settings.adapter))
    return report, {name: tuple(target.weight().shape) for name, target in targets.items()}, loaded


def steps(
    trainer: Trainer, attention: str, settings: Config, job: dict[str, Any]
) -> dict[str, Any]:
    store = memory_store(make_rows(job["rows"]), LONGEST)
    loader = StepLoader(
        store, settings.train, settings.run.seed, attention, job["rank"], job["workers"]
    )
    schedule = Schedule(settings.train.model_copy(update={"steps": job["steps"] + 1}), store)
    _, *counted = islice(trainer.steps(loader, 0, schedule), job["steps"] + 1)
    return {
        "step": median(result.seconds for result in counted),
        "sequences": settings.train.global_batch,
    }


def exchanges(gradient: TreeSum) -> dict[str, float]:
    """Return seconds to exchange a gradient with one leaf per worker, and one number per worker."""
    return {
        "gradient bytes": 4.0 * gradient.whole.numel(),
        "exchange": repeated(gradient),
        "message": repeated(TreeSum(torch.zeros(collectives.world_size()))),
    }


def repeated(gradient: TreeSum) -> float:
    taken = []
    for _ in range(REPEATS):
        gradient.begin(collectives.world_size())
        with gradient.leaf(collectives.rank()):
            pass
        collectives.sum_in_place(torch.zeros(1))
        began = time.perf_counter()
        gradient.finish()
        taken.append(time.perf_counter() - began)
    return median(taken)


def checkpoint(trainer: Trainer, scratch: Path) -> dict[str, float]:
    """Return seconds for which a checkpoint stops the training, and seconds until it is written."""
    files = CheckpointManager(str(scratch / "checkpoints"), 2)
    began = time.perf_counter()
    files.save(1, written_state(trainer, 1))
    blocked = time.perf_counter() - began
    files.finish()
    return {"blocked": blocked, "written": time.perf_counter() - began}


if __name__ == "__main__":
    main()
    # Threads of a process group can crash when the interpreter exits. All output is printed already, so skip the exit.
    sys.stdout.flush()
    os._exit(0)
