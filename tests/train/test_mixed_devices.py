"""A training mixes no tensors of a GPU with tensors of the CPU, checked on a simulated GPU.

In a process of its own, which takes seconds; so this belongs to `make quick` all the same.
"""

import inspect
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

from olora_ray.adapter.layer import Factors
from olora_ray.model.attention import kernel
from olora_ray.train import checkpoint
from olora_ray.train.checkpoint import Checkpoint
from olora_ray.train.loop import Trainer
from olora_ray.train.optim import AdamW
from tests import crew, device_walk, fake_device, tiny
from tests.device_walk import QUESTIONS, STEPS, Seen
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


def _lines(file: str, function: Callable[..., Any]) -> Iterator[str]:
    lines, first = inspect.getsourcelines(function)
    return (f"{file}:{first + number}" for number in range(len(lines)))


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
