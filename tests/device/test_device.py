"""A training on a GPU is that of a CPU, and keeps the rules of a GPU: shown on a device without a GPU (gpu.py).

Everything runs in processes of its own, because torch keeps a device for good.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from olora_ray.cluster.spec import TrainSpec
from olora_ray.cluster.worker import StopRequests, train_at
from olora_ray.cluster.worker_context import SharedBase, SharedBaseContext
from olora_ray.common import collectives, node_cache
from olora_ray.model.attention import kernel
from olora_ray.model.source import BaseModel
from olora_ray.train import checkpoints
from olora_ray.train.loop import Trainer
from olora_ray.train.loss import SupervisedLoss
from tests import crew, device_walk, tiny
from tests.cluster.test_sharded_worker import Context
from tests.cluster.test_worker import Channel
from tests.crew import Crew
from tests.device import exchange, gpu, runs
from tests.device.mistakes import ONE_WORKER, TWO_WORKERS, broken, planted
from tests.device.runs import Outcome
from tests.device_walk import STEPS, Seen
from tests.families import zoo
from tests.families.variants import ALL
from tests.varlen_on_cpu import varlen_on_cpu

pytestmark = pytest.mark.skipif(gpu.missing() is not None, reason=str(gpu.missing()))
needs_varlen = pytest.mark.skipif(kernel() is None, reason="needs a newer torch")
CPU = torch.device("cpu")
OFF = {"float32": 1e-5, "bfloat16": 5e-3}
"""Relative difference of losses that rounding explains."""


@pytest.fixture(scope="module")
def child() -> Iterator[ProcessPoolExecutor]:
    """A process that has the device."""
    gpu.build()
    context = get_context("forkserver")
    context.set_forkserver_preload(crew.IMPORTED)
    with ProcessPoolExecutor(
        1, mp_context=context, initializer=_begin, initargs=(node_cache.CACHE,)
    ) as pool:
        yield pool


def _begin(cache: str) -> None:
    node_cache.CACHE = cache
    torch.set_num_threads(1)
    gpu.load()


def test_the_device_counts_what_a_gpu_would_do(child: ProcessPoolExecutor) -> None:
    seen = child.submit(_used).result()
    assert sum(seen.waits.values()) == 4
    assert list(seen.pageable) == ["elsewhere: copy to the device, [65536] of float"]
    assert list(seen.conversions) == ["elsewhere: copy to the device, [8] of c10::BFloat16"]
    assert (seen.launches, seen.sent) == (2, 2 * 4 * 65536 + 4 * 8)


def _used() -> gpu.Seen:
    with gpu.watched() as seen:
        there = torch.zeros(65536).to("cuda")
        torch.zeros(65536, pin_memory=True).to("cuda", non_blocking=True)
        torch.zeros(8, dtype=torch.bfloat16).to("cuda", torch.float32)
        there.sum().item()
        there.nonzero()
    with pytest.raises(RuntimeError, match="on the same device"):
        torch.mul(there, torch.zeros(65536))
    assert (
        float((there[torch.tensor([3, 4])] + torch.tensor(2.0)).sum()) == 4.0
    )  # indices and numbers of the CPU
    return seen


@needs_varlen
def test_a_training_keeps_the_rules_of_a_gpu(child: ProcessPoolExecutor) -> None:
    assert child.submit(broken, None).result() == []


@needs_varlen
@pytest.mark.parametrize("mistake", ONE_WORKER)
def test_a_mistake_is_found(child: ProcessPoolExecutor, mistake: str) -> None:
    rules = child.submit(broken, mistake).result()
    assert any(re.match(ONE_WORKER[mistake][-1], rule, re.DOTALL) for rule in rules), rules


# The parts of a worker, each with the CPU's numbers.

CASES: dict[str, dict[str, Any]] = {
    "sdpa": {"dropout": 0.1},
    "varlen, bfloat16": {"attention": "varlen", "dtype": torch.bfloat16, "dropout": 0.1},
    "eager on a shared base": {"attention": "eager", "on_device": True},
    "PiSSA, preconditioned, two rates": {
        "method": "pissa",
        "changes": {"lr_ratio": 4.0, "optimizer": "preconditioned"},
    },
    "spectral": {"method": "olora", "changes": {"optimizer": "spectral"}},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[needs_varlen] * ("varlen" in name)) for name in CASES]
)
def test_a_training_has_the_cpus_losses_and_answers(
    child: ProcessPoolExecutor, tmp_path: Path, name: str
) -> None:
    here, there, waits = child.submit(_walks, tmp_path, **CASES[name]).result()
    assert len(set(here.losses)) == STEPS + 1
    expected = pytest.approx(
        [here.before, *here.losses, here.after], rel=OFF["bfloat16" if "16" in name else "float32"]
    )
    assert [there.before, *there.losses, there.after] == expected
    if "16" not in name:  # rounding may decide between two tokens
        assert there.answers == here.answers
    of_masks = 0 if "varlen" in name else STEPS  # transformers asks whether a micro-batch is packed
    assert sum(waits.values()) == STEPS + of_masks, waits


def _walks(
    folder: Path,
    make: Callable[..., Any] = tiny.llama,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    **how: Any,
) -> tuple[Seen, Seen, Counter[str]]:
    """Return, in the child, what walks over the CPU and the device saw, and where the steps of the second waited."""
    found = []
    with varlen_on_cpu() if attention == "varlen" else contextlib.nullcontext():
        for device in (CPU, gpu.load()):
            trainer = device_walk.start(make(attention=attention, dtype=dtype), device, **how)
            frozen = [part for part in trainer.loss.parameters() if not part.requires_grad]
            assert {(part.device, part.dtype) for part in frozen} == {(device, dtype)}
            found.append(device_walk.walk(trainer, device_walk.kept_in(folder / device.type)))
        with gpu.watched() as seen:
            device_walk.steps(trainer, 0)
    return found[0], found[1], seen.waits


# Whole runs: family, precision and changes of the config.

Run = tuple[str, str, dict[str, Any]]
LLAMA: Run = ("llama", "float32", {})
RUNS: dict[str, Run] = {
    "recomputed": ("llama", "bfloat16", {"train__activation_checkpointing": True}),
    # Its measurement counts padding, of which sdpa has some.
    "automatic rate": (
        "llama",
        "float32",
        {"adapter__method": "pissa", "train__lr": "auto", "model__attention": "sdpa"},
    ),
    "fp8": ("llama", "float32", {"model__quantization": "fp8"}),
    "factors from data": (
        "llama",
        "float32",
        {"adapter__method": "eva", "adapter__init_tokens": 96},
    ),
}


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(LLAMA, id="llama"),
        *(pytest.param(RUNS[name], marks=pytest.mark.slow, id=name) for name in RUNS),
    ],
)
def test_a_run_leaves_what_it_leaves_on_a_cpu(
    child: ProcessPoolExecutor, tmp_path: Path, asked: Run
) -> None:
    here, there = (
        child.submit(_run, asked, _made(tmp_path, asked), device).result()
        for device in ("cpu", "cuda")
    )
    _assert_same(here, there, asked)
    assert there.merged[0] == there.merged[1]


def _made(folder: Path, asked: Run) -> Path:
    if not (folder / "model").exists():
        zoo.build(ALL[asked[0]], folder / "model", getattr(torch, asked[1]))
    return folder


def _run(asked: Run, folder: Path, device: str) -> Outcome:
    _, dtype, changes = asked
    gpu.load()  # before any backward pass
    return runs.run(
        folder / "model",
        folder / device,
        torch.device(device, 0),
        {"model__dtype": dtype, **changes},
    )


def _assert_same(here: Outcome, there: Outcome, asked: Run) -> None:
    _, dtype, changes = asked
    assert (here.attention, there.attention) == (
        changes.get("model__attention", "segments"),
        "sdpa",
    )
    assert len(here.losses) == runs.STEPS
    assert there.losses == pytest.approx(here.losses, rel=OFF[dtype])
    assert there.held_out == pytest.approx(here.held_out, rel=OFF[dtype])
    assert dtype != "float32" or there.answers == here.answers


# Errors of the device in its first steps: one sentence with advice, whatever their type.

FULL, FREE = 2**20, 40 * 2**30
"""Free bytes of the device when an error is looked at."""
NCCL = (
    "NCCL error, unhandled cuda error\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nFailed to"
    " CUDA calloc async 25165824 bytes"
)
PLANTED: list[tuple[str, str, int, str]] = [
    ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2 GiB", FREE, "micro_batch"),
    ("OutOfMemoryError", "HIP out of memory. Tried to allocate 2 GiB", FREE, "micro_batch"),
    ("AcceleratorError", "CUDA error: out of memory", FULL, "micro_batch"),
    ("RuntimeError", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED", FULL, "micro_batch"),
    ("RuntimeError", "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED", FULL, "micro_batch"),
    ("RuntimeError", "Triton Error [CUDA]: out of memory", FULL, "micro_batch"),
    ("DistBackendError", NCCL, FULL, "micro_batch"),
    ("AcceleratorError", "CUDA error: no kernel image is available", FREE, "another node"),
    ("AcceleratorError", "CUDA error: uncorrectable ECC error", FREE, "another node"),
    ("RuntimeError", "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED", FREE, "another node"),
]


@pytest.mark.parametrize("where", ["base", "step"])
def test_an_error_of_the_device_ends_in_advice(
    child: ProcessPoolExecutor, tmp_path: Path, where: str
) -> None:
    found = child.submit(_problems, tmp_path, where).result()
    for (_, text, _, advice), problem in zip(PLANTED, found, strict=True):
        assert text.partition("\n")[0] in problem
        if where == "base" and text.endswith("EXECUTION_FAILED"):  # or the model's code is wrong
            assert problem.endswith("name another model")
        else:
            assert "61.0 GiB were planned" in problem
            assert advice in problem


def _problems(folder: Path, where: str) -> list[str | None]:
    """Return, in the child, how a training ends with each of the errors, in the self-test or in the second step."""
    types = {
        each.__name__: each
        for each in (torch.OutOfMemoryError, torch.AcceleratorError, dist.DistBackendError)
    }
    device = gpu.load()
    found = []
    for number, (name, text, free, _) in enumerate(PLANTED):
        config = tiny.decided(**runs.SETTINGS | {"train__micro_batch": 4})
        base = BaseModel("m", "/m", "")
        spec = TrainSpec(config, base, "tokenizer", (1,), tiny.store(8), None, planned=61 * 2**30)
        model = tiny.llama()
        error = types.get(name, RuntimeError)(text)
        steps = Trainer.step

        def fails(*given: Any, steps: Any = steps, error: Any = error, **named: Any) -> Any:
            if where == "base" or given[1] == 1:
                raise error
            return steps(*given, **named)

        failing = mock.patch.object(Trainer, "step", fails)
        if where == "base":
            failing = mock.patch.object(model.model, "forward", fails)
        memory = mock.patch.object(torch.cuda, "mem_get_info", lambda _, free=free: (free, 2**36))
        context = SharedBaseContext(SharedBase(SupervisedLoss(model), device))
        quiet = mock.patch.object(StopRequests, "_listen")
        with failing, memory, quiet:
            result = train_at(context, spec, str(folder / f"{where}{number}"), Channel())
        found.append(result.problem)
    return found


# A GPU with less memory than the plan expects: the widest micro-batch is tried before the first step.

NEEDED = {False: 3, "swiglu": 2, True: 1}
"""Recomputation -> memory of a token, where a planted error limits the memory."""
AUTO = ("train.micro_batch", "train.activation_checkpointing")
LENGTH = 512
PLENTY = 10 * 4 * LENGTH


@pytest.mark.parametrize(
    ("memory", "auto", "rung"),
    [
        (PLENTY, AUTO, (4, False)),
        (2500, AUTO, (4, True)),
        (1500, AUTO, (2, True)),
        (1500, AUTO[:1], (1, False)),
    ],
)
def test_what_fits_is_found_before_the_first_step(
    child: ProcessPoolExecutor,
    tmp_path: Path,
    memory: int,
    auto: Sequence[str],
    rung: tuple[int, bool],
) -> None:
    _made(tmp_path, LLAMA)
    (found, losses), again = child.submit(_in_memory, tmp_path, "auto", memory, auto).result()
    assert found == dict(zip(AUTO, rung, strict=True))
    assert again == (found, losses)
    (_, fixed), _ = child.submit(_in_memory, tmp_path, "fixed", PLENTY, (), *rung).result()
    assert losses == fixed


def _in_memory(
    folder: Path,
    name: str,
    memory: int,
    auto: Sequence[str],
    micro: int = 4,
    again: bool = False,
    full: int = 0,
) -> list[tuple[dict[str, Any], list[float]]]:
    """Return rung and losses of a run while worker `full` has this memory, and of its last step done again with more.

    The process has the device.
    """
    device = gpu.load()
    sizes = {"data__max_length": LENGTH, "train__micro_batch": micro}
    sizes |= {"train__activation_checkpointing": again}
    workers = {"cluster__workers": collectives.world_size()}
    config = tiny.decided(**runs.SETTINGS | sizes | workers)
    model = str(folder / "model")
    base = BaseModel("m", model, model)
    planned = {"planned": 61 * 2**30, "step_seconds": 0.25}
    spec = TrainSpec(
        config, base, "tokenizer", (1,), tiny.store(8), None, auto=tuple(auto), **planned
    )
    forward = SupervisedLoss.forward
    found = []
    for attempt, most in enumerate((memory, PLENTY)):

        def fails(loss: Any, batch: Any, each: bool = False, most: int = most) -> torch.Tensor:
            needed = batch.tokens * NEEDED[loss.recompute] * torch.is_grad_enabled()
            if collectives.rank() == full and needed > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return forward(loss, batch, each)

        channel = Channel()
        limited = mock.patch.object(SupervisedLoss, "forward", fails)
        with limited, mock.patch.object(StopRequests, "_listen"):
            result = train_at(Context(device), spec, str(folder / name), channel)
        assert (result.problem, result.state is None) == (None, False)
        lines = [each for each in channel.messages if "61.0 GiB" in str(each)]
        # After the second step of a worker, by rank 0; the last step done again is one alone.
        told = int(attempt + collectives.rank() == 0)
        assert [*channel.metrics("train/gpu_peak_gib")] == [2] * told
        assert ["0.25 s" in line for line in lines] == [True] * told
        losses = [row["train/loss"] for row in result.state.history if "train/loss" in row]
        found.append((result.state.rung, losses))
        last = folder / name / checkpoints.name_of(runs.STEPS) / "manifest.json"
        collectives.wait_for_all()
        last.unlink(missing_ok=True)
        collectives.wait_for_all()
    return found


# Two workers.


@pytest.fixture(scope="module")
def two() -> Iterator[Crew]:
    gpu.build()
    workers = Crew(2)
    yield workers
    workers.close()


def test_two_workers_exchange_as_nccl_demands(two: Crew, tmp_path: Path) -> None:
    here, _ = two.run(_run, LLAMA, _made(tmp_path, LLAMA), "cpu")
    there, other = two.run(_exchange, None, tmp_path)
    _assert_same(here, there, LLAMA)
    assert (there.losses, there.held_out, there.answers) == (
        other.losses,
        other.held_out,
        other.answers,
    )
    assert {*there.sent} == {*other.sent} == {"all_reduce", "broadcast", "isend", "irecv"}


@pytest.mark.parametrize("mistake", TWO_WORKERS)
def test_a_mistake_of_an_exchange_is_found(two: Crew, tmp_path: Path, mistake: str) -> None:
    for told in two.run(_exchange, mistake, _made(tmp_path, LLAMA)):
        assert re.match(TWO_WORKERS[mistake][-1], told)


def test_the_worker_with_the_least_memory_decides_for_all(two: Crew, tmp_path: Path) -> None:
    _made(tmp_path, LLAMA)
    found, other = two.run(_of_two, tmp_path)
    assert found == other
    rungs = [rung for rung, _ in found]
    assert rungs == [dict(zip(AUTO, (2, True), strict=True))] * 2


def _of_two(folder: Path) -> Any:
    with exchange.by_nccls_rules():
        return _in_memory(folder, "two", 1500, AUTO, full=1)


def _exchange(mistake: str | None, folder: Path) -> Outcome | str:
    """Return the outcome of a run of this worker by NCCL's rules, or what they refuse."""
    with exchange.by_nccls_rules() as rules, planted(mistake):
        try:
            outcome = _run(LLAMA, folder, "cuda")
        except AssertionError as error:
            return str(error)
        finally:
            dist.barrier()
    outcome.sent = dict(rules.sent)
    return outcome
