"""The contestants of benchmarks/throughput.py, each in its own process: a timed pass over all rows, or a gradient.

python benchmarks/contestants.py JOB        (json; throughput.py starts it)
"""

import json
import os
import resource
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from common import config, memory_store, our_trainer
from peers import ROWS_A_STEP, model_of_peft, one_by_one, peft_trainer, timed_training
from torch import Tensor

from olora_ray.config.schema import Config
from olora_ray.tokens.store import order

LONGEST = 512
RANK = 16
Rows = list[tuple[np.ndarray, np.ndarray]]
"""(input_ids, supervised) of each row."""


@dataclass(frozen=True)
class Setting:
    name: str
    kind: str
    """ours, peft, or alone: single rows, for the reference gradient."""
    workers: int = 1
    micro: int = 2
    """Packs (ours) or rows (peft) in a micro-batch."""


def main() -> None:
    warnings.filterwarnings("ignore")
    import datasets

    from olora_ray.common.logs import quiet_transformers

    quiet_transformers()
    datasets.disable_progress_bars()
    job = json.loads(sys.argv[1])
    setting = Setting(**job["setting"])
    if job["gradient"]:
        found = gradient(setting, job)
        if job["rank"] == 0:
            torch.save(found, job["gradient"])
        done: dict[str, float] = {}
    else:
        run = run_ours if setting.kind == "ours" else run_peer
        done = run(setting, job)
    done["megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("\n" + json.dumps(done), flush=True)


def make_rows(count: int, seed: int = 0) -> Rows:
    generator = np.random.default_rng(seed)
    lengths = np.clip(generator.lognormal(np.log(120), 0.6, count), 16, LONGEST).astype(int)
    return [
        (generator.integers(3, 40_000, n, dtype=np.int32), np.arange(n) >= n // 2) for n in lengths
    ]


def run_ours(setting: Setting, job: dict[str, Any]) -> dict[str, float]:
    from olora_ray.train.loader import Schedule, StepLoader

    join(setting, job)
    store = memory_store(make_rows(job["rows"]), LONGEST)
    size = packs_a_step(store, setting)
    cfg = our_config(job, setting, size)
    trainer, attention = our_trainer(cfg, job["folder"])
    loader = StepLoader(store, cfg.train, cfg.run.seed, attention, job["rank"], setting.workers)
    steps = -(
        -len(store) // size
    )  # the last is filled up from the next pass; what is done is counted
    whole = Schedule(cfg.train.model_copy(update={"steps": steps}), store)
    deque(islice(trainer.steps(loader, 0, whole), 1), maxlen=0)
    taken = timed(lambda: deque(trainer.steps(loader, 0, whole), maxlen=0))
    done = [int(i) for i in order(len(store), cfg.run.seed, 0, steps * size)]
    rows = sum(len(store[i].segments) for i in done)
    return {**taken, "rows": rows, "supervised": store.counts(done).supervised}


def run_peer(setting: Setting, job: dict[str, Any]) -> dict[str, float]:
    model, rows = peer(setting, job), make_rows(job["rows"])
    peft_trainer(model, rows[:ROWS_A_STEP], setting, job).train()
    trainer = peft_trainer(model, rows, setting, job)
    return {
        **timed_training(trainer),
        "rows": len(rows),
        "supervised": sum(int(marked.sum()) for _, marked in rows),
    }


def gradient(setting: Setting, job: dict[str, Any]) -> dict[str, Tensor]:
    """Return the gradient of the mean loss per supervised token over all rows, by LAYER.da and LAYER.db."""
    rows = make_rows(job["rows"])
    if setting.kind == "ours":
        return gradient_of_ours(setting, job, rows)
    model = peer(setting, job)
    if setting.kind == "alone":
        return one_by_one(model, rows)
    found: dict[str, Tensor] = {}
    peft_trainer(model, rows, setting, job, found).train()
    return found


def gradient_of_ours(setting: Setting, job: dict[str, Any], rows: Rows) -> dict[str, Tensor]:
    """Return the gradient that rank 0 passes to its optimizer for one step over all rows."""
    from olora_ray.train.loader import Schedule, StepLoader

    join(setting, job)
    store = memory_store(rows, LONGEST)
    cfg = our_config(job, setting, len(store))
    trainer, attention = our_trainer(cfg, job["folder"])
    found: dict[str, Tensor] = {}

    def keep(lr: float, norm: float | None = None) -> float:
        found.update(
            {name: part.clone() for name, part in trainer.flat.named(trainer.flat.grad).items()}
        )
        return 0.0

    trainer.optimizer.step = keep
    loader = StepLoader(store, cfg.train, cfg.run.seed, attention, job["rank"], setting.workers)
    deque(
        trainer.steps(loader, 0, Schedule(cfg.train.model_copy(update={"steps": 1}), store)),
        maxlen=0,
    )
    return found


def join(setting: Setting, job: dict[str, Any]) -> None:
    import torch.distributed as dist

    if setting.workers > 1:
        meeting = f"file://{job['scratch']}/meeting"
        dist.init_process_group(
            "gloo", init_method=meeting, rank=job["rank"], world_size=setting.workers
        )


def peer(setting: Setting, job: dict[str, Any]) -> Any:
    """Return PEFT's model in the precision of ours; in float32 for the reference gradient."""
    from olora_ray.model.load import pick_dtype

    dtype = pick_dtype(our_config(job, setting, setting.micro).model, torch.device("cpu"))
    if setting.kind == "alone":
        dtype = torch.float32
    return model_of_peft(job["folder"], dtype, RANK)


def timed(run: Callable[[], object]) -> dict[str, float]:
    """Return (wall-clock seconds, CPU seconds of this process)."""
    start, used = time.perf_counter(), time.process_time()
    run()
    return {"seconds": time.perf_counter() - start, "cpu": time.process_time() - used}


def packs_a_step(store: Sequence[Any], setting: Setting) -> int:
    """Return the number of packs per step that is nearest to ROWS_A_STEP rows in full micro-batches."""
    rows_a_pack = sum(len(found.segments) for found in store) / len(store)
    share = setting.micro * setting.workers
    return max(1, round(ROWS_A_STEP / rows_a_pack / share)) * share


def our_config(job: dict[str, Any], setting: Setting, size: int) -> Config:
    return config(
        job["scratch"],
        {"name": job["folder"], "dtype": job["dtype"]},
        adapter={"rank": RANK, "alpha": RANK},
        train={
            "global_batch": size,
            "micro_batch": setting.micro,
            "lr": 1.0e-4,
            "schedule": "constant",
            "warmup": 0.0,
        },
        cluster={"workers": setting.workers},
    )


if __name__ == "__main__":
    main()
    # Threads of a process group can crash when the interpreter exits. All output is printed already, so skip the exit.
    sys.stdout.flush()
    os._exit(0)
