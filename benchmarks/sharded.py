"""Memory of workers that hold a part of the base each, beside workers that hold all of it: both in the same run.

A random Llama of 1.2 billion parameters in bfloat16, factors, steps of training, an evaluation, and the export's merge.
Shown is the peak of each phase above what the process had before: of anonymous memory, which a process has for itself,
and of all resident memory, with the pages of files that are mapped and that others may map too. Losses and adapters of
both have to be equal, to the bit.

    python benchmarks/sharded.py [--workers 2] [--layers 16] [--length 256] [--steps 2] [--strategies fsdp,ddp]
"""

import argparse
import hashlib
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import MemoryStore, machine, table
from export import GIB, random_adapter, write_base

from olora_ray.adapter import merge
from olora_ray.adapter.initialise import at_scale
from olora_ray.adapter.inject import find_targets, install, wrap
from olora_ray.common.quiet import quiet_transformers
from olora_ray.config.load import build
from olora_ray.config.schema import Config
from olora_ray.model.load import skeleton
from olora_ray.model.source import BaseModel
from olora_ray.tokens.store import Pack
from olora_ray.train.loader import StepLoader
from olora_ray.train.loop import Trainer, evaluate
from olora_ray.train.malloc import keep_freed_memory
from olora_ray.train.new_factors import new_factors
from olora_ray.train.parallel import place_model
from olora_ray.train.schedule import Schedule
from olora_ray.train.sharded_base import load_base

CPU = torch.device("cpu")
LOOK_EVERY = 0.002
"""Seconds between looks at the memory."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a process."""

    own: int
    resident: int

    @classmethod
    def now(cls) -> "Memory":
        """That of this process."""
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        own, mapped = (int(status[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
        return cls(own, own + mapped)

    def above(self, start: "Memory") -> "Memory":
        """What it is more than at the start."""
        return Memory(self.own - start.own, self.resident - start.resident)

    def most(self, other: "Memory") -> "Memory":
        """The larger of both, of each kind."""
        return Memory(max(self.own, other.own), max(self.resident, other.resident))


@dataclass
class Seen:
    """What a process tells of itself."""

    peaks: dict[str, Memory] = field(default_factory=dict)
    """Phase -> memory above that before the first phase."""
    result: str = ""
    """Losses, and a digest of the adapter."""


def main() -> None:
    """Make the model, train it in each way, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--layers", type=int, default=16, help="16 are 1.2 billion parameters")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence; a micro-batch has one")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--strategies", default="fsdp,ddp")
    parser.add_argument("--folder", help="where 5 GB are written; removed afterwards")
    args = parser.parse_args()
    quiet_transformers()
    print(machine())
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="olora-sharded-") as folder:
        base = Path(folder) / "base"
        count = write_base(base, args.layers)
        size = (base / "model.safetensors").stat().st_size
        print(f"{count / 1e9:.2f} billion parameters, {size / GIB:.2f} GiB; {args.workers} workers")
        seen = {
            strategy: in_processes(partial(train, base, strategy, args), args.workers)
            for strategy in args.strategies.split(",")
        }
        seen["one task"] = in_processes(partial(export, base), 1)
    rows = [
        row(f"{name}: {phase}", [each.peaks[phase] for each in found], size)
        for name, found in seen.items()
        for phase in found[0].peaks
    ]
    print(table(("phase", "own GiB", "of the base", "resident GiB", "of the base"), rows))
    results = {each.result for found in seen.values() for each in found if each.result}
    print(f"losses and adapters: {'equal' if len(results) == 1 else 'DIFFERENT'} ({' | '.join(sorted(results))})")


def row(name: str, peaks: list[Memory], base: int) -> tuple[str, ...]:
    """A line of the table, of the process with the most of each kind."""
    own, resident = max(each.own for each in peaks), max(each.resident for each in peaks)
    return name, f"{own / GIB:.2f}", f"{own / base:.2f}", f"{resident / GIB:.2f}", f"{resident / base:.2f}"


def in_processes(work: Callable[[int], Seen], workers: int) -> list[Seen]:
    """What `work(rank)` returns in each of new processes, which are a process group if they are several."""
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="olora-meet-") as folder:
        pipes = []
        processes = []
        for rank in range(workers):
            here, there = context.Pipe(duplex=False)
            processes.append(
                context.Process(target=_in_group, args=(work, f"file://{folder}/group", rank, workers, there))
            )
            processes[-1].start()
            there.close()
            pipes.append(here)
        found = [pipe.recv() for pipe in pipes]
        for process in processes:
            process.join()
    return found


def _in_group(work: Callable[[int], Seen], meeting: str, rank: int, workers: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    quiet_transformers()
    if workers > 1:
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=workers)
    pipe.send(work(rank))
    if workers > 1:
        dist.destroy_process_group()


def config(base: Path, strategy: str, args: argparse.Namespace) -> Config:
    """A run with a sequence for each worker a step."""
    return build(
        {
            "run": {"name": "benchmark"},
            "model": {"name": str(base), "dtype": "bfloat16", "attention": "sdpa"},
            "data": {"train": [{"path": "unused.jsonl"}], "max_length": args.length},
            "adapter": {"rank": 16, "alpha": 16},
            "train": {"steps": args.steps, "global_batch": args.workers, "micro_batch": 1, "lr": 1.0e-3},
            "cluster": {"workers": args.workers, "strategy": strategy},
        }
    )


def train(base: Path, strategy: str, args: argparse.Namespace, rank: int) -> Seen:
    """A worker from its base to an evaluation."""
    keep_freed_memory()
    settings, seen = config(base, strategy, args), Seen()
    store: Any = random_store(4 * args.workers, args.length)
    start = Memory.now()
    with peak(seen, "load", start):
        loss = load_base(str(base), settings, CPU)
    with peak(seen, "factors", start):
        adapter = settings.adapter
        targets = find_targets(loss.model, adapter.targets, adapter.rank)
        factors, *_ = new_factors(loss, targets, settings, store, CPU)
        adapted = wrap(loss.model, at_scale(factors, adapter), adapter.scale())
        del factors
        install(loss.model, adapted)
        place_model(loss, strategy, CPU)
        trainer = Trainer(loss, adapted, settings, CPU)
    with peak(seen, "train", start):
        loader = StepLoader(store, settings.train, settings.run.seed, "sdpa", rank, args.workers)
        losses = [result.loss for result in trainer.steps(loader, 0, Schedule(settings.train, store))]
    with peak(seen, "evaluate", start):
        losses.append(evaluate(trainer, store, "sdpa", rank, args.workers))
    digest = hashlib.sha256(trainer.flat.vector.numpy().tobytes()).hexdigest()[:12]
    seen.result = f"{', '.join(f'{loss:.6f}' for loss in losses)}; {digest}"
    return seen


def export(base: Path, _: int) -> Seen:
    """The task that merges, which no worker does."""
    seen, start = Seen(), Memory.now()
    model = skeleton(BaseModel(str(base), str(base), ""), build_model(base))
    adapter = random_adapter(model, 16)
    with peak(seen, "merge", start):
        merge.write_merged(base, adapter, 1.0, base.parent / "merged", model)
    return seen


def build_model(base: Path) -> Any:
    """The section `model` of a config."""
    tree = {"run": {"name": "a"}, "model": {"name": str(base)}, "data": {"train": [{"path": "a.jsonl"}]}}
    return build(tree).model


class Rows(MemoryStore):
    """Sequences that are all there, for training and evaluation."""

    digest = "random"

    @property
    def available(self) -> int:
        return len(self)

    total = available

    @property
    def manifest(self) -> Any:
        return SimpleNamespace(supervised=self.supervised(range(len(self))), packs=len(self))

    def locate(self, index: int) -> tuple[int, int, int]:
        """Shard, place in it, sequences of the shard."""
        return 0, index, len(self)


def random_store(count: int, length: int) -> Rows:
    """Sequences of random tokens, all supervised but the first."""
    rng = np.random.default_rng(0)
    return Rows(
        Pack(rng.integers(2, 128000, length).astype(np.int32), np.arange(length) > 0, (length,)) for _ in range(count)
    )


@contextmanager
def peak(seen: Seen, phase: str, start: Memory) -> Iterator[None]:
    """Note the most memory of a phase above `start`."""
    done, found, began = threading.Event(), [Memory.now()], perf_counter()

    def look() -> None:
        while not done.wait(LOOK_EVERY):
            found.append(found.pop().most(Memory.now()))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        most = seen.peaks[phase] = found[0].most(Memory.now()).above(start)
        seconds = perf_counter() - began
        print(f"{phase}: {most.own / GIB:.2f} GiB own, {seconds:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
