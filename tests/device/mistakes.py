"""A short training on the device, the rules that it keeps there, and mistakes that break one of them each."""

import contextlib
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from olora_ray.adapter.candidates import Target
from olora_ray.common import collectives
from olora_ray.tokens.collate import Batch
from olora_ray.train import loss as losses
from olora_ray.train.checkpoint import TrainState
from olora_ray.train.held_out import evaluate
from olora_ray.train.loss import SupervisedLoss
from tests import device_walk, tiny
from tests.device import gpu
from tests.device_walk import STEPS
from tests.varlen_on_cpu import varlen_on_cpu

MICRO_BATCHES = 4
"""Of a step."""
LAUNCHES = 510
"""Most kernels of a micro-batch of the tiny model with a share of its step: 499 were counted."""
BYTES = 1000
"""Most bytes of a micro-batch: 925 were counted, for ids, positions, borders and labels of a sequence."""
OF_A_CHECKPOINT = 4
"""The adapter, its two moments and the best adapter; the frozen factors are copied for the first checkpoint only."""


def broken(mistake: str | None) -> list[str]:
    """Return the rules that a training with this mistake, or without one, breaks, each with what was seen.

    The process has the device.
    """
    with tempfile.TemporaryDirectory() as folder, varlen_on_cpu(), planted(mistake):
        try:
            return [f"{rule}: {seen}" for rule, seen in _seen(Path(folder))]
        except Exception as error:
            files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
            ours = [
                file.relative_to(gpu.PACKAGE) for file in files if file.is_relative_to(gpu.PACKAGE)
            ]
            return [f"refused: {ours[-1] if ours else 'elsewhere'}: {error}"]


def _seen(folder: Path) -> Iterator[tuple[str, object]]:
    model, changes = (
        tiny.llama(attention="varlen", dtype=torch.bfloat16),
        {"global_batch": MICRO_BATCHES},
    )
    size, held_out = sum(part.nbytes for part in model.parameters()), tiny.store(2, seed=9)
    with gpu.watched() as seen:
        trainer = device_walk.start(
            model, gpu.load(), dropout=0.1, changes={"micro_batch": 1, **changes}
        )
    if seen.conversions:
        yield "conversions", seen.conversions
    if (
        seen.sent > 2.6 * size
    ):  # the base, the weights of which factors are made, and twice the factors
        yield "bytes of the start", (seen.sent, size)
    with gpu.watched() as seen:
        device_walk.steps(trainer, 0)
    if sum(seen.waits.values()) > STEPS:  # for all of a step's numbers at once
        yield "waits of a step", seen.waits
    if seen.launches > LAUNCHES * STEPS * MICRO_BATCHES:
        yield "launches", seen.launches
    if seen.sent > BYTES * STEPS * MICRO_BATCHES:
        yield "bytes of a step", seen.sent
    with gpu.watched() as seen:
        evaluate(trainer, held_out, "varlen")  # type: ignore[arg-type]
    if sum(seen.waits.values()) > 1:
        yield "waits of an evaluation", seen.waits
    for _ in range(2):
        with gpu.watched() as seen:
            write = trainer.snapshot(
                TrainState(step=2, best_step=1), trainer.flat.vector.clone(), {}, ""
            )
    write(folder)
    if sum(seen.waits.values()) > OF_A_CHECKPOINT:
        yield "copies of a checkpoint", seen.waits


@contextlib.contextmanager
def planted(mistake: str | None) -> Iterator[None]:
    if mistake is None:
        yield
        return
    owner, name, change, _ = (ONE_WORKER | TWO_WORKERS)[mistake]
    whole = getattr(owner, name)
    with mock.patch.object(
        owner, name, lambda *arguments, **named: change(whole, *arguments, **named)
    ):
        yield


def _labels_stay(to: Any, batch: Batch, device: torch.device) -> Batch:
    moved: Batch = to(batch, device)
    return replace(moved, labels=batch.labels)


def _copied_one_by_one(_: Any, batch: Batch, device: torch.device) -> Batch:
    inputs = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.inputs.items()
    }
    return replace(
        batch,
        inputs=inputs,
        predicts=batch.predicts.to(device),
        labels=batch.labels.to(device),
    )


def _loss_is_read(forward: Any, loss: SupervisedLoss, *arguments: Any, **named: Any) -> Tensor:
    found: Tensor = forward(loss, *arguments, **named)
    assert found.sum().item() > 0
    return found


def _objects(summed: Any, tensor: Tensor) -> None:
    summed(tensor)
    collectives.gather(tensor.tolist())


def _sent(change: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    def transfer(whole: Any, outgoing: Any, incoming: Any) -> None:
        whole([(worker, change(part)) for worker, part in outgoing], incoming)

    return transfer


Mistake = tuple[Any, str, Callable[..., Any], str]
"""Owner and name of a function, what takes its place, with the function as its first argument, and how it is found."""
ONE_WORKER: dict[str, Mistake] = {
    "labels stay on the CPU": (Batch, "to", _labels_stay, "refused: train/loss.py: .*same device"),
    "a micro-batch's loss is read": (
        SupervisedLoss,
        "forward",
        _loss_is_read,
        "waits of a step: .* _loss: a number",
    ),
    "a batch is copied by tensors": (
        Batch,
        "to",
        _copied_one_by_one,
        "waits of a step: .*copy to the device",
    ),
    "weights are converted and then copied": (
        Target,
        "numbers",
        lambda numbers, target: numbers(target).float(),
        "bytes of the start",
    ),
    "the loss takes a token at a time": (losses, "chunk_rows", lambda *_: 1, "launches"),
}
TWO_WORKERS: dict[str, Mistake] = {
    "gradients are sent from the CPU": (
        collectives,
        "transfer",
        _sent(Tensor.cpu),
        "isend: NCCL takes no tensor of",
    ),
    "losses are exchanged as objects": (
        collectives,
        "sum_in_place",
        _objects,
        "all_gather: a step sends no objects",
    ),
}
