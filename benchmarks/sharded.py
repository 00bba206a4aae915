"""Memory of workers that each hold a part of the base model (fsdp), beside workers that hold all of it (ddp).

Both run in the same benchmark, on a random Llama of 1.2 billion parameters in bfloat16: factors, training steps, an
evaluation, the adapter folder, and the merge in a separate task. The table has the peak of each phase above the
memory before it, for two measures. Anonymous memory belongs to one process alone. Resident memory also contains pages
of mapped files, which processes may share: ddp maps its base model, fsdp copies its part. Losses, gradients and
exported adapters of both must be equal to the bit, for fsdp also with recomputed blocks. Without native bfloat16 the
sequences are short, because a product takes a hundred times as long there.

    python benchmarks/sharded.py [--workers 2] [--layers 16] [--length 256] [--steps 2] [--ways fsdp,fsdp-again,ddp]
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
from common import MemoryStore, machine, met, table
from export import GIB, LLAMA_1B, random_adapter, write_base

from olora_ray.adapter.initialise import at_scale
from olora_ray.adapter.inject import find_targets, install, wrap
from olora_ray.cluster.worker_context import prepare_device
from olora_ray.common.logs import quiet_transformers
from olora_ray.config.load import build
from olora_ray.config.schema import Config
from olora_ray.model.load import empty_model, pick_dtype, skeleton
from olora_ray.model.source import BaseModel
from olora_ray.pipeline import merge
from olora_ray.pipeline.peft_folder import write_adapter
from olora_ray.tokens.plan import Pack
from olora_ray.train.data_driven import new_factors
from olora_ray.train.held_out import evaluate
from olora_ray.train.loader import Schedule, StepLoader
from olora_ray.train.loop import Trainer
from olora_ray.train.parallel import load_base, place_model

CPU = torch.device("cpu")
LOOK_EVERY = 0.002
"""Seconds between two samples of the memory."""
AGAIN = "-again"
"""Suffix of a strategy whose blocks are recomputed in the backward pass."""
VECTORS = 6
"""Vectors of the adapter's size: itself, gradient, two moments, and temporary ones of factors and exchange."""
NEAR = 1.15
"""Largest ratio of the memory to the part of the base model plus the gathered blocks."""


@dataclass(frozen=True)
class Memory:
    """Anonymous and resident memory of a process, in bytes."""

    own: int
    resident: int

    @classmethod
    def now(cls) -> "Memory":
        status = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
        own, *mapped = (
            int(status[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile", "RssShmem")
        )
        return cls(own, own + sum(mapped))

    def above(self, start: "Memory") -> "Memory":
        return Memory(self.own - start.own, self.resident - start.resident)

    def most(self, other: "Memory") -> "Memory":
        return Memory(max(self.own, other.own), max(self.resident, other.resident))


@dataclass
class Seen:
    peaks: dict[str, Memory] = field(default_factory=dict)
    """Phase -> memory above the start."""
    result: str = ""
    """Losses, and digests of the last gradient and of the exported adapter."""
    adapter: int = 0
    """Number of trained parameters."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--layers", type=int, default=16, help="16 are 1.2 billion parameters")
    fast = pick_dtype(build_model(Path()), CPU) == torch.bfloat16
    length = 256 if fast else 8
    parser.add_argument(
        "--length",
        type=int,
        default=length,
        help="tokens per sequence; a micro-batch has one sequence",
    )
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--ways", default=f"fsdp,fsdp{AGAIN},ddp")
    parser.add_argument("--folder", help="folder for 5 GB, deleted afterwards")
    args = parser.parse_args()
    quiet_transformers()
    print(machine())
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="olora-sharded-") as folder:
        base = Path(folder) / "base"
        count = write_base(base, num_hidden_layers=args.layers)
        size = (base / "model.safetensors").stat().st_size
        print(
            f"{count / 1e9:.2f} billion parameters, {size / GIB:.2f} GiB; {args.workers} workers, {args.steps} steps of"
            f" a sequence of {args.length} tokens each"
        )
        seen = {
            way: in_processes(partial(train, base, way, args), args.workers)
            for way in args.ways.split(",")
        }
        seen["one task"] = in_processes(partial(export, base), 1)
    rows = [
        row(f"{name}: {phase}", [each.peaks[phase] for each in found], size)
        for name, found in seen.items()
        for phase in found[0].peaks
    ]
    print(table(("phase", "own GiB", "of the base", "resident GiB", "of the base"), rows))
    for way in args.ways.split(","):
        if way.startswith("fsdp"):
            print(near_a_share(way, seen[way], size, args))
    results = {each.result for found in seen.values() for each in found if each.result}
    equal = len(results) == 1
    print(
        f"losses, gradients and adapters: {'equal' if equal else 'DIFFERENT'} ({' | '.join(sorted(results))})"
    )
    if not equal:
        raise SystemExit(1)


def near_a_share(way: str, found: list[Seen], base: int, args: argparse.Namespace) -> str:
    """Compare a worker's own peak with its part of the base model plus the memory that every worker needs."""
    embedding = 2 * LLAMA_1B["vocab_size"] * LLAMA_1B["hidden_size"]
    blocks = base - embedding
    # Embeddings are mapped pages of the file, as for ddp. A gathered block exists twice for a moment, as received and
    # as weights, while the next block arrives.
    gathered = 3 * blocks // args.layers
    own, adapter = (
        max(peak.own for each in found for peak in each.peaks.values()),
        4 * VECTORS * found[0].adapter,
    )
    planned = blocks // args.workers + gathered + adapter
    return (
        f"{way}: a worker has up to {own / GIB:.2f} GiB, {own / planned:.2f} times the expected memory (target at most"
        f" {NEAR:g}: {met(own <= NEAR * planned)}): {blocks / args.workers / GIB:.2f} for its share of the blocks,"
        f" {gathered / GIB:.2f} for gathered blocks, {adapter / GIB:.2f} for adapter, gradient and moments"
    )


def row(name: str, peaks: list[Memory], base: int) -> tuple[str, ...]:
    own, resident = max(each.own for each in peaks), max(each.resident for each in peaks)
    return (
        name,
        f"{own / GIB:.2f}",
        f"{own / base:.2f}",
        f"{resident / GIB:.2f}",
        f"{resident / base:.2f}",
    )


def in_processes(work: Callable[[int], Seen], workers: int) -> list[Seen]:
    """Return `work(rank)` from each of several new processes, which form a process group."""
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="olora-meet-") as folder:
        pipes = []
        processes = []
        for rank in range(workers):
            here, there = context.Pipe(duplex=False)
            processes.append(
                context.Process(
                    target=_in_group, args=(work, f"file://{folder}/group", rank, workers, there)
                )
            )
            processes[-1].start()
            there.close()
            pipes.append(here)
        found = [pipe.recv() for pipe in pipes]
        for process in processes:
            process.join()
    return found


def _in_group(
    work: Callable[[int], Seen], meeting: str, rank: int, workers: int, pipe: Any
) -> None:
    torch.set_num_threads(1)
    quiet_transformers()
    if workers > 1:
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=workers)
    pipe.send(work(rank))
    if workers > 1:
        dist.destroy_process_group()


def config(base: Path, strategy: str, args: argparse.Namespace) -> Config:
    return build(
        {
            "run": {"name": "benchmark"},
            "model": {"name": str(base), "dtype": "bfloat16", "attention": "sdpa"},
            "data": {"train": [{"path": "unused.jsonl"}], "max_length": args.length},
            "adapter": {"rank": 16, "alpha": 16},
            "train": {
                "steps": args.steps,
                "global_batch": args.workers,
                "micro_batch": 1,
                "lr": 1.0e-3,
            },
            "cluster": {"workers": args.workers, "strategy": strategy},
        }
    )


def train(base: Path, way: str, args: argparse.Namespace, rank: int) -> Seen:
    strategy = way.removesuffix(AGAIN)
    settings, seen = config(base, strategy, args), Seen()
    prepare_device(settings, CPU)
    store: Any = random_store(args.workers, args.length)
    import torch.distributed.fsdp  # noqa: F401  # modules are no one's memory of a model

    empty_model(str(base), settings.model, CPU)
    start = Memory.now()
    with peak(seen, "load", start):
        loss = load_base(str(base), settings, CPU)
        loss.recompute = way.endswith(AGAIN)
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
        losses = [
            result.loss for result in trainer.steps(loader, 0, Schedule(settings.train, store))
        ]
    with peak(seen, "evaluate", start):
        losses.append(evaluate(trainer, store, "sdpa").loss)
    with peak(seen, "adapter folder", start):
        weights = {name: layer.weights() for name, layer in adapted.items()}
        model = skeleton(BaseModel(str(base), str(base), ""), settings.model)
        folder = base.parent / f"adapter-{way}-{rank}"
        write_adapter(weights, settings.adapter, "base", folder, model)
    digests = (
        trainer.flat.grad.numpy().tobytes(),
        (folder / "adapter_model.safetensors").read_bytes(),
    )
    told = ", ".join(hashlib.sha256(found).hexdigest()[:12] for found in digests)
    seen.adapter = trainer.flat.vector.numel()
    seen.result = f"{', '.join(f'{loss:.6f}' for loss in losses)}; {told}"
    return seen


def export(base: Path, _: int) -> Seen:
    seen, start = Seen(), Memory.now()
    model = skeleton(BaseModel(str(base), str(base), ""), build_model(base))
    adapter = random_adapter(model, 16)
    with peak(seen, "merge", start):
        merge.write_merged(base, adapter, 1.0, base.parent / "merged", model)
    return seen


def build_model(base: Path) -> Any:
    tree = {
        "run": {"name": "a"},
        "model": {"name": str(base)},
        "data": {"train": [{"path": "a.jsonl"}]},
    }
    return build(tree).model


class Rows(MemoryStore):
    digest = "random"

    @property
    def available(self) -> int:
        return len(self)

    total = available

    @property
    def manifest(self) -> Any:
        return SimpleNamespace(packs=len(self))

    def locate(self, index: int) -> tuple[int, int, int]:
        return 0, index, len(self)


def random_store(count: int, length: int) -> Rows:
    rng = np.random.default_rng(0)
    return Rows(
        Pack(rng.integers(2, 128000, length).astype(np.int32), np.arange(length) > 0, (length,))
        for _ in range(count)
    )


@contextmanager
def peak(seen: Seen, phase: str, start: Memory) -> Iterator[None]:
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
        print(
            f"{phase}: {most.own / GIB:.2f} GiB own, {seconds:.0f} s", file=sys.stderr, flush=True
        )


if __name__ == "__main__":
    main()
