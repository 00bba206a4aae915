"""A short training on the device, the rules that it keeps there, and mistakes that break one of them each."""

import contextlib
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from olora_ray.adapter.candidates import Target
from olora_ray.adapter.layer import AdaptedWeight
from olora_ray.common import collectives
from olora_ray.tokens.collate import Batch
from olora_ray.train import loss as losses
from olora_ray.train.checkpoint import TrainState
from olora_ray.train.loop import Trainer, evaluate
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.optim import AdamW
from olora_ray.train.tree import TreeSum
from tests import device_walk, tiny
from tests.device import gpu
from tests.device_walk import STEPS
from tests.varlen_on_cpu import varlen_on_cpu

Patch = tuple[Any, str, Any]
"""Owner, name and replacement of a function."""
MICRO_BATCHES = 4
"""Of a step."""
LAUNCHES = 510
"""Most kernels of a micro-batch of the tiny model with a share of its step: 499 were counted."""
BYTES = 1000
"""Most bytes of a micro-batch: 925 were counted, for ids, positions, borders and labels of a sequence."""
OF_A_CHECKPOINT = 4
"""The adapter, its two moments and the best adapter; the frozen factors are copied for the first checkpoint only."""


def broken(mistake: str | None) -> list[str]:
    """Return the rules that a training with a mistake breaks, each with what was seen, in a child that has the device.

    None: a training without one.
    """
    device = gpu.load()
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder, varlen_on_cpu():
        if mistake is not None:
            stack.enter_context(planted(MISTAKES[mistake]))
        try:
            return [f"{rule}: {seen}" for rule, seen in _seen(device, Path(folder))]
        except Exception as error:
            files = [frame.filename.partition("/olora_ray/")[2] for frame in traceback.extract_tb(error.__traceback__)]
            return [f"refused: {next(filter(None, reversed(files)), 'elsewhere')}: {error}"]


def _seen(device: torch.device, folder: Path) -> Iterator[tuple[str, object]]:
    model = tiny.llama(attention="varlen", dtype=torch.bfloat16)
    size = sum(part.nbytes for part in model.parameters())
    with gpu.watched() as seen:
        trainer = device_walk.start(model, device, dropout=0.1, changes={"global_batch": MICRO_BATCHES, "micro_batch": 1})
    if seen.conversions:
        yield "conversions", seen.conversions
    if seen.sent > 2.6 * size:  # the base, the weights of which factors are made, and twice the factors
        yield "bytes of the start", (seen.sent, size)
    with gpu.watched() as seen:
        device_walk.steps(trainer, 0)
    if sum(waits_of_steps(seen).values()) > STEPS:  # for all of a step's numbers at once
        yield "waits of a step", seen.waits
    if seen.launches > LAUNCHES * STEPS * MICRO_BATCHES:
        yield "launches", seen.launches
    if seen.sent > BYTES * STEPS * MICRO_BATCHES:
        yield "bytes of a step", seen.sent
    with gpu.watched() as seen:
        evaluate(trainer, tiny.store(2, seed=9), "varlen")  # type: ignore[arg-type]
    if sum(seen.waits.values()) > 1:
        yield "waits of an evaluation", seen.waits
    for _ in range(2):
        with gpu.watched() as seen:
            write = trainer.snapshot(TrainState(step=2, best_step=1), trainer.flat.vector.clone(), {}, "")
    write(folder)
    if sum(seen.waits.values()) > OF_A_CHECKPOINT:
        yield "copies of a checkpoint", seen.waits


def waits_of_steps(seen: gpu.Seen) -> Counter[str]:
    """Return the waits but for one that steps still have: `shared[-1] = number` copies a number to the device."""
    return Counter({place: count for place, count in seen.waits.items() if "_shared: copy to the device, []" not in place})


@contextlib.contextmanager
def planted(mistake: "Mistake") -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in mistake.patches():
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


@dataclass(frozen=True)
class Mistake:
    patches: Callable[[], list[Patch]]
    found: str
    """What a broken rule, or NCCL's refusal, says of it; a regular expression."""


def _wrapped(owner: Any, name: str, wrap: Callable[..., Any]) -> Callable[[], list[Patch]]:
    """`wrap` gets the function, and its arguments."""

    def patches() -> list[Patch]:
        whole = getattr(owner, name)
        return [(owner, name, lambda *arguments, **named: wrap(whole, *arguments, **named))]

    return patches


# Mistakes of one worker.


def _labels_stay(to: Any, batch: Batch, device: torch.device) -> Batch:
    moved: Batch = to(batch, device)
    return Batch(moved.inputs, moved.predicts, batch.labels, batch.tokens)


def _b0_stays(begin: Any, trainer: Trainer) -> None:
    begin(trainer)
    layer = next(iter(trainer.adapted.values()))
    assert layer.b0 is not None
    layer.b0 = layer.b0.cpu()


def _moment_stays(begin: Any, optimizer: AdamW, *arguments: Any) -> None:
    begin(optimizer, *arguments)
    state = optimizer.inner.state[optimizer.parameters[0]]
    state["exp_avg"] = state["exp_avg"].cpu()


def _own_dropout(_: Any, layer: AdaptedWeight, x: Tensor) -> Tensor:
    return x * torch.empty_like(x).bernoulli_(0.9, generator=torch.Generator().manual_seed(0))


def _named_by_numpy(snapshot: Any, trainer: Trainer, *arguments: Any) -> Any:
    trainer.flat.vector.detach().numpy()
    return snapshot(trainer, *arguments)


def _loss_is_read(backward: Any, trainer: Trainer, *arguments: Any) -> Tensor:
    loss: Tensor = backward(trainer, *arguments)
    assert loss.item() > 0
    return loss


def _mask_picks(to: Any, batch: Batch, device: torch.device) -> Batch:
    moved: Batch = to(batch, device)
    return Batch(moved.inputs, moved.predicts, moved.labels[moved.labels >= 0], batch.tokens)


def _copied_one_by_one(_: Any, batch: Batch, device: torch.device) -> Batch:
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.inputs.items()}
    return Batch(inputs, batch.predicts.to(device), batch.labels.to(device), batch.tokens)


def _mask_of_the_cpu(taken: Any, loss: SupervisedLoss, batch: Batch) -> dict[str, Any]:
    ids = batch.inputs["input_ids"]
    assert isinstance(ids, Tensor)
    mask = torch.ones(len(ids), 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril().pin_memory()
    return taken(loss, batch) | {"attention_mask": mask.to(ids.device, non_blocking=True)}


def _in_pieces(state: Any, optimizer: AdamW, copied_to: str | None = None) -> dict[str, Tensor]:
    return {name: part.to(copied_to) for name, part in state(optimizer).items()}


def _checked_in_evaluations(forward: Any, loss: SupervisedLoss, batch: Batch) -> Tensor:
    found: Tensor = forward(loss, batch)
    assert torch.is_grad_enabled() or torch.isfinite(found)
    return found


class _Converting:
    """A weight that goes to the device by way of float32 on the CPU, as one copy."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def to(self, device: torch.device, *_: Any) -> Tensor:
        return self.weight.to(device, torch.float32)


ONE_WORKER: dict[str, Mistake] = {
    "labels stay on the CPU": Mistake(_wrapped(Batch, "to", _labels_stay), "refused: train/loss.py: .*same device"),
    "a factor stays on the CPU": Mistake(
        _wrapped(Trainer, "__post_init__", _b0_stays), "refused: adapter/layer.py: .*same device"
    ),
    "a moment stays on the CPU": Mistake(
        _wrapped(AdamW, "__init__", _moment_stays), "refused: train/optim.py: .*same device"
    ),
    "dropout draws with a generator of the CPU": Mistake(
        _wrapped(AdaptedWeight, "dropped_out", _own_dropout), "refused: .*'cuda' device type for generator"
    ),
    "an adapter becomes numpy's": Mistake(_wrapped(Trainer, "snapshot", _named_by_numpy), "refused: .*to numpy"),
    "the loss of a micro-batch is read": Mistake(
        _wrapped(Trainer, "_backward", _loss_is_read), r"waits of a step: .*train/loop.py:\d+ _accumulate: a number"
    ),
    "each loss of an evaluation is checked": Mistake(
        _wrapped(SupervisedLoss, "forward", _checked_in_evaluations),
        r"waits of an evaluation: .*train/loop.py:\d+ evaluate: a number",
    ),
    "a mask picks the labels": Mistake(_wrapped(Batch, "to", _mask_picks), "waits of a step: .*aten::nonzero"),
    "a batch is copied tensor by tensor": Mistake(
        _wrapped(Batch, "to", _copied_one_by_one), "waits of a step: .*copy to the device"
    ),
    "masks are made on the CPU": Mistake(_wrapped(SupervisedLoss, "taken", _mask_of_the_cpu), "bytes of a step"),
    "weights are converted while they are copied": Mistake(
        _wrapped(Target, "numbers", lambda numbers, target: _Converting(numbers(target))),
        r"conversions: .*adapter/initialise.py:\d+ _compute",
    ),
    "weights are converted before they are copied": Mistake(
        _wrapped(Target, "numbers", lambda numbers, target: numbers(target).float()), "bytes of the start"
    ),
    "the loss takes a token at a time": Mistake(lambda: [(losses, "chunk_rows", lambda *_: 1)], "launches"),
    "a checkpoint copies layer by layer": Mistake(_wrapped(AdamW, "state", _in_pieces), "copies of a checkpoint"),
}

# Mistakes of an exchange between workers.


def _exchanged(change: Callable[[Tensor], Tensor]) -> Callable[[], list[Patch]]:
    """Let the exchange of gradients send something else than a part of the gradient."""

    def transfer(whole: Any, outgoing: Any, incoming: Any) -> None:
        whole([(worker, change(part)) for worker, part in outgoing], incoming)

    return _wrapped(collectives, "transfer", transfer)


def _objects(shared: Any, trainer: Trainer, *arguments: Any) -> Tensor:
    found: Tensor = shared(trainer, *arguments)
    collectives.gather(found.tolist())
    return found


def _signal_of_the_cpu(sum_in_place: Any, tensor: Tensor) -> None:
    copy = tensor.cpu()
    sum_in_place(copy)
    tensor.copy_(copy)


def _norm_by_worker(finish: Any, gradient: TreeSum) -> None:
    finish(gradient)
    collectives.sum_in_place(torch.stack([gradient.whole, gradient.whole], dim=1)[:, 0])


TWO_WORKERS: dict[str, Mistake] = {
    "gradients are sent from the CPU": Mistake(_exchanged(Tensor.cpu), "isend: NCCL takes no tensor of the cpu"),
    "gradients are sent with gaps": Mistake(
        _exchanged(lambda part: part.repeat_interleave(2, output_size=2 * len(part))[::2]),
        "isend: NCCL takes only contiguous tensors",
    ),
    "losses are summed on the CPU": Mistake(
        _wrapped(collectives, "sum_in_place", _signal_of_the_cpu), "all_reduce: NCCL takes no tensor of the cpu"
    ),
    "a sum is over every second number": Mistake(
        _wrapped(TreeSum, "finish", _norm_by_worker), "all_reduce: NCCL takes only contiguous tensors"
    ),
    "losses are exchanged as objects": Mistake(
        _wrapped(Trainer, "_shared", _objects), "all_gather_object: a step sends no objects"
    ),
}
MISTAKES = ONE_WORKER | TWO_WORKERS
