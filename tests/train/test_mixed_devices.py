"""A training mixes no tensors of a GPU with tensors of the CPU, checked on a simulated GPU.

In a process of its own, which takes seconds; so this belongs to `make quick` all the same.
"""

import inspect
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.utils.backend_registration as registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from olora_ray.adapter.layer import Factors
from olora_ray.model.attention import kernel
from olora_ray.tokens.collate import collate
from olora_ray.train import checkpoint
from olora_ray.train.checkpoint import Checkpoint, TrainState
from olora_ray.train.loop import Trainer
from olora_ray.train.optim import AdamW
from tests import crew, device_walk, fake_device, tiny
from tests.device_walk import LIMIT, QUESTIONS, STEPS, Seen
from tests.fake_device import FakeDevice

pytestmark = pytest.mark.skipif(
    not hasattr(registration, "_setup_privateuseone_for_python_backend"), reason="needs a newer torch"
)

IN_STEPS = (
    "adapter/layer.py",
    "model/attention.py",
    "tokens/collate.py",
    "train/loop.py",
    "train/loss.py",
    "train/optim.py",
)
"""The files that a step runs through."""
LENGTH = 500
"""Tokens of a sequence: its square is more than any vector of the tiny model has."""


@dataclass(frozen=True)
class Case:
    """A model and how it is trained."""

    model: Callable[..., Any] = tiny.llama
    attention: str = "sdpa"
    dtype: torch.dtype = torch.float32
    method: str = "olora"
    dropout: float = 0.1
    on_device: bool = False
    changes: dict[str, Any] = field(default_factory=dict)
    """Of `train`."""


CASES = {
    "sdpa": Case(),
    "sdpa, bfloat16": Case(dtype=torch.bfloat16, dropout=0.0),
    "varlen, bfloat16": Case(attention="varlen", dtype=torch.bfloat16),
    "eager, bfloat16": Case(attention="eager", dtype=torch.bfloat16),
    "eager on a shared base": Case(attention="eager", on_device=True),
    "GPT-2, plain LoRA": Case(tiny.gpt2, method="lora"),
    "PiSSA, preconditioned, two rates": Case(method="pissa", changes={"lr_ratio": 4.0, "precondition": True}),
}


@pytest.fixture(scope="module")
def child() -> Iterator[ProcessPoolExecutor]:
    """A process that a test may spoil."""
    context = get_context("forkserver")
    context.set_forkserver_preload(crew.IMPORTED)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        yield pool


@pytest.mark.parametrize("name", [name for name in CASES if kernel() or "varlen" not in name])
def test_a_training_on_a_device_mixes_nothing(child: ProcessPoolExecutor, name: str) -> None:
    seen, waits = child.submit(_walk, CASES[name]).result()
    assert seen.losses == [1.0] * (STEPS + 1)
    assert len(seen.answers) == len(QUESTIONS)
    assert max(map(len, seen.answers)) > 2  # with a cache, then
    # A step waits once, when all of it has been asked for, and an evaluation once: more would keep a GPU waiting.
    of_checkpoints = {"loop": Trainer.snapshot, "optim": AdamW.state}
    copies = {line for file, function in of_checkpoints.items() for line in _lines(f"train/{file}.py", function)}
    copies |= {*_lines("adapter/layer.py", Factors.on_cpu)}
    in_steps = [waits[place] for place in waits if place.startswith(IN_STEPS) and place not in copies]
    assert sum(in_steps) <= STEPS + 1 + 2, waits


def test_a_checkpoint_copies_what_training_changes_in_four_pieces(child: ProcessPoolExecutor) -> None:
    """Adapter, its two moments and the best adapter; the frozen factors are copied for the first checkpoint only."""
    first, second = child.submit(_copies).result()
    assert first > second == 4


def _lines(file: str, function: Callable[..., Any]) -> Iterator[str]:
    lines, first = inspect.getsourcelines(function)
    return (f"{file}:{first + number}" for number in range(len(lines)))


def test_the_walk_is_a_training(tmp_path: Path) -> None:
    trainer = device_walk.start(tiny.llama(), torch.device("cpu"))
    seen = device_walk.walk(trainer, device_walk.kept_in(tmp_path))
    assert seen.before != seen.after < 10
    assert len(set(seen.losses)) == STEPS + 1
    assert {len(one) for one in seen.answers} == {LIMIT}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_are_made_on_the_device(child: ProcessPoolExecutor, attention: str) -> None:
    here, there = child.submit(_made, attention).result()
    assert there >= LENGTH**2
    assert here < 8 * LENGTH


@pytest.mark.parametrize(
    ("left", "file"),
    [("b0", "adapter/layer.py"), ("moment", "train/optim.py"), ("labels", "train/loss.py")],
)
def test_a_tensor_that_was_left_on_the_cpu_is_found_with_its_place(
    child: ProcessPoolExecutor, left: str, file: str
) -> None:
    error = child.submit(_spoilt, left).result()
    assert "FakeTensorDeviceMismatchError" in error
    assert f'olora_ray/{file}", line ' in error


def _walk(case: Case) -> tuple[Seen, Counter[str]]:
    """Run a whole training in the child, and return where it waited for the device."""
    torch.set_num_threads(1)
    with FakeDevice() as fake, mock.patch.object(checkpoint, "save", _keep):
        model = case.model(attention=case.attention, dtype=case.dtype)
        trainer = device_walk.start(model, fake.device, case.method, case.dropout, case.on_device, case.changes)
        frozen = [part for part in trainer.loss.parameters() if not part.requires_grad]
        assert {(part.device.type, part.dtype) for part in frozen} == {(fake_device.NAME, case.dtype)}
        fake.true_every = 8  # whether all answers have ended is asked at every token
        return device_walk.walk(trainer, _read_back), fake.waits


def _copies() -> list[int]:
    """Return the copies from the device of two checkpoints, one after the other, in the child."""
    with FakeDevice() as fake:
        trainer, counts = device_walk.start(tiny.llama(), fake.device), []
        for _ in range(2):
            before = fake.waits.total()
            trainer.snapshot(TrainState(step=2, best_step=1), trainer.flat.vector.clone(), {}, "")
            counts.append(fake.waits.total() - before)
    return counts


def _made(attention: str) -> tuple[int, int]:
    """Return, in the child, the size of the largest tensor of a packed micro-batch on the CPU and on the device."""
    torch.set_num_threads(1)
    with FakeDevice() as fake:
        trainer = device_walk.start(tiny.llama(attention=attention, max_position_embeddings=LENGTH), fake.device)
        trainer.loss.given_masks = attention == "eager"
        with _Largest() as seen:
            batch = collate([tiny.pack(LENGTH - 9, 9), tiny.pack(LENGTH)], attention)
            trainer.loss(batch.to(fake.device)).backward()
    return seen.numbers["cpu"], seen.numbers[fake_device.NAME]


class _Largest(TorchDispatchMode):
    """Records the size of the largest new tensor per device."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for part in tree_leaves(found):
            if isinstance(part, torch.Tensor):
                self.numbers[part.device.type] = max(self.numbers[part.device.type], part.numel())
        return found


_kept: list[Checkpoint] = []


def _keep(folder: Path, adapter: Any, best: Any, optimizer: Any, state: Any, identity: Any, config_yaml: str) -> None:
    """Replaces checkpoint.save, because there are no numbers to write."""
    factors = [part for one in adapter.values() for part in (one.factors.a0, one.factors.b0, one.da, one.db)]
    for part in (*factors, *optimizer.values(), *best.values()):
        assert part is None or part.device.type == "cpu"
    _kept.append(Checkpoint(dict(adapter), dict(best), dict(optimizer), state, {}))


def _read_back(write: Callable[[Path], None]) -> Checkpoint:
    write(Path())
    return _kept.pop()


def _spoilt(left: str) -> str:
    """Return, in the child, the traceback of a training with one tensor on the CPU."""
    torch.set_num_threads(1)
    with FakeDevice() as fake:
        trainer = device_walk.start(tiny.llama(), fake.device)
        _leave(trainer, left)
        try:
            device_walk.steps(trainer, 0)
        except Exception:
            return traceback.format_exc()
    return ""


def _leave(trainer: Trainer, left: str) -> None:
    """Put one of the tensors that a step needs on the CPU."""
    layer = next(iter(trainer.adapted.values()))
    if left == "b0":
        assert layer.b0 is not None
        layer.b0 = layer.b0.cpu()
    elif left == "moment":
        state = trainer.optimizer.inner.state[trainer.optimizer.parameters[0]]
        state["exp_avg"] = state["exp_avg"].cpu()
    else:
        whole = trainer.loss.forward
        trainer.loss.forward = lambda batch: whole(  # type: ignore[method-assign]
            type(batch)(batch.inputs, batch.predicts, batch.labels.cpu(), batch.tokens)
        )
