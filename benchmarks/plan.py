"""The plan of time without a GPU: a step of 135M to 70B on six cards, and the step of this CPU beside its plan.

    python benchmarks/plan.py            the cards, in a minute
    python benchmarks/plan.py --cpu      this CPU: its rate, bandwidth and launch are measured, then its step

A CPU is measured on one thread, in its own seconds, so that other programs on the machine matter little.

The cards' numbers are their makers', times what kernels are estimated to reach (olora_ray/train/price.py). A step has
the passes of one micro-batch, with rank 16 on all layers in bfloat16, without optimizer and exchange.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from common import config, machine, memory_store, table
from gpu_models import SIZES, chats, random_model
from gpu_training import settings_of, trainer_of

from olora_ray.adapter.inject import find_targets
from olora_ray.cluster.malloc import keep_freed_memory
from olora_ray.common.logs import quiet_transformers
from olora_ray.config.decided import DecidedConfig, Expected
from olora_ray.model.load import pick_dtype
from olora_ray.train.estimate import measure, widest
from olora_ray.train.loss import chunk_rows
from olora_ray.train.price import Card, Work, card_of, step_time

MODELS = ("135m", "1b", "8b", "70b")
CARDS = ("H100", "H200", "A100 80GB", "L40S", "A10G", "RTX 4090")
BATCHES = ((2, 512), (2, 4096))
"""Sequences of a micro-batch, and tokens of each."""
CPU = torch.device("cpu")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", action="store_true", help="measure this CPU instead")
    parser.add_argument("--size", choices=tuple(SIZES), default="135m", help="with --cpu (135m)")
    parser.add_argument("--batch", type=int, default=2, help="with --cpu: sequences at once (2)")
    parser.add_argument("--length", type=int, default=512, help="with --cpu: their tokens (512)")
    args = parser.parse_args(argv)
    quiet_transformers()
    if args.cpu:
        print(on_this_cpu(args.size, args.batch, args.length))
        return 0
    rows = []
    for size in MODELS:
        for batch, length in BATCHES:
            rows.append((f"{size}, {batch} x {length}", *on_cards(size, batch, length)))
    print(table(("seconds of a step (tokens per second)", *CARDS), rows))
    return 0


def on_cards(size: str, batch: int, length: int) -> list[str]:
    job = job_of(size, batch, length, "bfloat16")
    work = work_of(job, settings_of(job), gpu=True)
    cells = []
    for name in CARDS:
        card = card_of(name)
        assert card is not None
        seconds = step_time(work, card).seconds
        cells.append(f"{seconds:.2g} ({batch * length / seconds:,.0f})")
    return cells


def job_of(size: str, batch: int, length: int, dtype: str) -> dict[str, Any]:
    """Return a job of gpu_training.py."""
    return {
        "size": size,
        "batch": batch,
        "length": length,
        "dtype": dtype,
        "device": "cpu",
        "rank": 16,
        "recompute": False,
        "step_tokens": batch * length,
    }


def work_of(job: dict[str, Any], settings: DecidedConfig, gpu: bool) -> Work:
    model = random_model(job["size"], getattr(torch, job["dtype"]), torch.device("meta"))
    targets = find_targets(model, "all-linear", job["rank"])
    found = measure(model, targets, settings, Expected(gpu, job["dtype"], "auto"))
    assert found.problem is None, found.problem
    return found.work


def on_this_cpu(size: str, batch: int, length: int) -> str:
    """Return the plan of a micro-batch with this CPU's measured numbers, beside the measured micro-batch."""
    keep_freed_memory()
    torch.set_num_threads(1)
    dtype = pick_dtype(config("", {"name": "unused"}).model, CPU)
    job = job_of(size, batch, length, str(dtype).removeprefix("torch."))
    settings = settings_of(job)
    card = card_of_cpu(job, dtype)
    plan = step_time(work_of(job, settings, gpu=False), card)
    store = memory_store(chats(size, length, batch * length), length)
    trainer, tested, _ = trainer_of(job, settings, store)
    rows = widest(settings, tested.attention)
    measured = best(lambda: trainer.loss(rows).backward(), 3)
    line = plan.line("this CPU")
    return (
        f"{machine()}\nrate {card.rate / 1e9:.0f} GFLOP/s, bandwidth {card.bandwidth / 1e9:.1f} GB/s, launch"
        f" {card.launch * 1e6:.1f} us\n{size}, {batch} x {length} tokens, {tested.attention}: {line}; measured"
        f" {measured:.3g} s, {plan.seconds / measured - 1:+.0%} by the plan"
    )


def card_of_cpu(job: dict[str, Any], dtype: torch.dtype) -> Card:
    """Measure the numbers of this CPU: operations and bytes per second over the kinds of kernels of a layer."""
    operations = seconds = 0.0
    for run, count in products(job, dtype):
        operations += count
        seconds += best(run, 5)
    size = spent = 0.0
    for kernel, count in elementwise(job, dtype):
        size += count
        spent += best(kernel, 5)
    small = torch.zeros(8)
    launch = best(lambda: [small.add_(1.0) for _ in range(1000)], 5) / 1000
    return Card(operations / seconds, size / spent, launch)


Kernel = tuple[Callable[[], object], float]


def products(job: dict[str, Any], dtype: torch.dtype) -> Iterator[Kernel]:
    """Yield the products of a layer, forward and backward, with their operations."""
    shape = SIZES[job["size"]].shape
    tokens = job["batch"] * job["length"]
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    size = hidden // shape["num_attention_heads"]
    groups = shape["num_key_value_heads"]
    width = 2 * job["rank"]
    for m, n in (
        *[(hidden, hidden), (groups * size, hidden)] * 2,
        *[(inner, hidden)] * 2,
        (hidden, inner),
    ):
        x, y = torch.randn(tokens, n).to(dtype), torch.randn(tokens, m).to(dtype)
        weight = torch.randn(m, n).to(dtype)
        down, up = torch.randn(width, n).to(dtype), torch.randn(m, width).to(dtype)
        low = torch.randn(tokens, width).to(dtype)
        yield partial(torch.mm, x, weight.T), 2.0 * tokens * m * n
        yield partial(torch.mm, y, weight), 2.0 * tokens * m * n
        for left, right in ((x, down.T), (y, up), (low, down)):
            yield partial(torch.mm, left, right), 2.0 * left.numel() * right.shape[1]
        yield partial(torch.addmm, y, low, up.T), 2.0 * tokens * m * width
        yield partial(torch.mm, low[:, : job["rank"]].T, x), 1.0 * tokens * n * width
        yield partial(torch.mm, y.T, low[:, : job["rank"]]), 1.0 * tokens * m * width
    heads = job["batch"] * groups
    ways = shape["num_attention_heads"] // groups
    query = torch.randn(heads, ways * job["length"], size)
    key = torch.randn(heads, size, job["length"])
    weights = torch.randn(heads, ways * job["length"], job["length"])
    each = 2.0 * weights.numel() * size
    for _ in range(2):  # scores and their gradient, in float32
        yield partial(torch.bmm, query, key), each
    for _ in range(2):
        yield partial(torch.bmm, weights.to(dtype), key.mT.to(dtype)), each
        yield partial(torch.bmm, weights.mT.to(dtype), query.to(dtype)), each


def elementwise(job: dict[str, Any], dtype: torch.dtype) -> Iterator[Kernel]:
    """Yield kinds of elementwise kernels, with the bytes that they read and write."""
    shape = SIZES[job["size"]].shape
    tokens = job["batch"] * job["length"]
    wide = torch.randn(tokens, shape["intermediate_size"]).to(dtype)
    slim = torch.randn(tokens, shape["hidden_size"]).to(dtype)
    full = slim.float()
    yield partial(torch.mul, wide, wide), 3.0 * wide.nbytes
    yield partial(torch.nn.functional.silu, wide), 2.0 * wide.nbytes
    yield partial(torch.Tensor.float, slim), 3.0 * slim.nbytes
    yield partial(torch.mul, full, full), 3.0 * full.nbytes
    yield partial(torch.Tensor.to, full, dtype), 1.5 * full.nbytes
    logits = torch.randn(chunk_rows(shape["vocab_size"], CPU), shape["vocab_size"])
    yield partial(torch.sub, logits, 1.0), 2.0 * logits.nbytes
    yield partial(torch.exp, logits), 2.0 * logits.nbytes


def best(run: Callable[[], object], times: int) -> float:
    """Return the CPU's seconds of the fastest of some calls; one before them warms up."""
    run()
    seconds = []
    for _ in range(times):
        began = time.process_time()
        run()
        seconds.append(time.process_time() - began)
    return min(seconds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
