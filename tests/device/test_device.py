"""A training on a GPU is that of a CPU, and keeps the rules of a GPU: shown on a device without a GPU (gpu.py).

Everything runs in processes of its own, because torch keeps a device for good.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from olora_ray.common import node_cache
from olora_ray.model.attention import kernel
from tests import crew, device_walk, tiny
from tests.crew import Crew
from tests.device import exchange, gpu, mistakes, runs
from tests.device.mistakes import MISTAKES, ONE_WORKER, TWO_WORKERS
from tests.device.runs import Outcome
from tests.device_walk import STEPS, Seen
from tests.families import zoo
from tests.families.variants import ALL
from tests.varlen_on_cpu import varlen_on_cpu

pytestmark = pytest.mark.skipif(gpu.missing() is not None, reason=str(gpu.missing()))
CPU = torch.device("cpu")
OFF = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
"""Relative difference of losses that rounding explains."""


@pytest.fixture(scope="module")
def child() -> Iterator[ProcessPoolExecutor]:
    """A process that a test may give the device."""
    gpu.build()
    context = get_context("forkserver")
    context.set_forkserver_preload(crew.IMPORTED)
    with ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(node_cache.CACHE,)) as pool:
        yield pool
        import sys, time
        print("CPU SECONDS", pool.submit(time.process_time).result(), file=sys.__stderr__)


def _begin(cache: str) -> None:
    import peft  # noqa: F401  # imported later, its bitsandbytes would look for CUDA's own library

    node_cache.CACHE = cache
    torch.set_num_threads(1)
    gpu.load()


@pytest.fixture(scope="module")
def two() -> Iterator[Crew]:
    gpu.build()
    workers = Crew(2)
    yield workers
    workers.close()


def test_a_training_keeps_the_rules_of_a_gpu(child: ProcessPoolExecutor) -> None:
    assert child.submit(mistakes.broken, None).result() == []


@pytest.mark.parametrize("mistake", ONE_WORKER)
def test_a_mistake_is_found(child: ProcessPoolExecutor, mistake: str) -> None:
    first, *_ = child.submit(mistakes.broken, mistake).result()
    assert re.match(MISTAKES[mistake].found, first, re.DOTALL)


# The parts of a worker, each with the CPU's numbers.


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


def test_the_walk_is_a_training(tmp_path: Path) -> None:
    trainer = device_walk.start(tiny.llama(), CPU)
    seen = device_walk.walk(trainer, device_walk.kept_in(tmp_path))
    assert seen.before != seen.after < 10
    assert len(set(seen.losses)) == STEPS + 1


@pytest.mark.parametrize("name", [name for name in CASES if kernel() or "varlen" not in name])
def test_a_training_has_the_cpus_losses_and_answers(child: ProcessPoolExecutor, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    here, there, waits = child.submit(_walks, case, tmp_path).result()
    assert [there.before, *there.losses, there.after] == pytest.approx(
        [here.before, *here.losses, here.after], rel=OFF[case.dtype]
    )
    assert there.answers == here.answers
    of_masks = 0 if case.attention == "varlen" else STEPS  # transformers asks whether a micro-batch is packed
    assert sum(waits.values()) == STEPS + of_masks, waits


def _walks(case: Case, folder: Path) -> tuple[Seen, Seen, Counter[str]]:
    """Return, in the child, what a walk over the CPU and over the device saw, and how often the steps waited for it."""
    found = []
    with varlen_on_cpu() if case.attention == "varlen" else contextlib.nullcontext():
        for number, device in enumerate((CPU, gpu.load())):
            model = case.model(attention=case.attention, dtype=case.dtype)
            trainer = device_walk.start(model, device, case.method, case.dropout, case.on_device, case.changes)
            frozen = [part for part in trainer.loss.parameters() if not part.requires_grad]
            assert {(part.device, part.dtype) for part in frozen} == {(device, case.dtype)}
            found.append(device_walk.walk(trainer, device_walk.kept_in(folder / str(number))))
        with gpu.watched() as seen:
            device_walk.steps(trainer, 0)
    return found[0], found[1], mistakes.waits_of_steps(seen)


# Whole runs.


@dataclass(frozen=True)
class Run:
    """A run of a family."""

    family: str = "llama"
    dtype: str = "float32"
    changes: dict[str, Any] = field(default_factory=dict)
    recompute: bool = False

    def off(self) -> float:
        return OFF[getattr(torch, self.dtype)]


RUNS = {
    "llama": Run(),
    "bfloat16, recomputed": Run(dtype="bfloat16", recompute=True),
    # Its measurement counts padding, of which sdpa has some.
    "automatic rate": Run(changes={"adapter__method": "olora_even", "train__lr": "auto", "model__attention": "sdpa"}),
    "fp8": Run(changes={"model__quantization": "fp8"}),
    "a mixture": Run("qwen3_moe"),
    "a tied head, plain LoRA": Run("gpt2", changes={"adapter__method": "lora"}),
    "factors from data": Run(changes={"adapter__method": "eva", "adapter__init_tokens": 96}),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "llama")) for name in RUNS])
def test_a_run_leaves_what_it_leaves_on_a_cpu(child: ProcessPoolExecutor, tmp_path: Path, name: str) -> None:
    asked, model = RUNS[name], tmp_path / "model"
    zoo.build(ALL[asked.family], model, getattr(torch, asked.dtype))
    here, there = (child.submit(_run, asked, model, tmp_path, on_gpu).result() for on_gpu in (False, True))
    _assert_same(here, there, asked)
    assert there.merged[0] == there.merged[1]


def _assert_same(here: Outcome, there: Outcome, asked: Run) -> None:
    assert (here.attention, there.attention) == (asked.changes.get("model__attention", "segments"), "sdpa")
    assert len(here.losses) == runs.STEPS
    assert there.losses == pytest.approx(here.losses, rel=asked.off())
    assert there.held_out == pytest.approx(here.held_out, rel=asked.off())
    assert asked.dtype != "float32" or there.answers == here.answers


def _run(asked: Run, model: Path, folder: Path, on_gpu: bool) -> Outcome:
    device = gpu.load()  # before any backward pass
    device = device if on_gpu else CPU
    changes = {"model__dtype": asked.dtype, **asked.changes}
    return runs.run(model, folder / device.type, device, changes, asked.recompute)


# Two workers.


def test_two_workers_exchange_as_nccl_demands(two: Crew, tmp_path: Path) -> None:
    asked, model = Run(), tmp_path / "model"
    zoo.build(ALL[asked.family], model)
    here, _ = two.run(_run, asked, model, tmp_path, False)
    there, other = two.run(_exchange, None, model, tmp_path)
    _assert_same(here, there, asked)
    assert (there.losses, there.held_out, there.answers) == (other.losses, other.held_out, other.answers)
    assert {*there.sent} == {*other.sent} == {"all_reduce", "broadcast", "isend", "irecv"}


@pytest.mark.parametrize("mistake", TWO_WORKERS)
def test_a_mistake_of_an_exchange_is_found(two: Crew, tmp_path: Path, mistake: str) -> None:
    model = tmp_path / "model"
    zoo.build(ALL["llama"], model)
    for told in two.run(_exchange, mistake, model, tmp_path):
        assert re.search(MISTAKES[mistake].found, told)


def _exchange(mistake: str | None, model: Path, folder: Path) -> Outcome | str:
    """Return the outcome of a run of this worker by NCCL's rules, or what they refuse."""
    gpu.load()
    with exchange.by_nccls_rules() as rules, contextlib.ExitStack() as stack:
        if mistake is not None:
            stack.enter_context(mistakes.planted(MISTAKES[mistake]))
        try:
            outcome = _run(Run(), model, folder, True)
        except AssertionError as error:
            return str(error)
        finally:
            dist.barrier()
    return Outcome(**vars(outcome) | {"sent": dict(rules.sent)})
