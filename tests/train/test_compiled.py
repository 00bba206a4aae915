"""Compiled blocks train as uncompiled ones, and a new length compiles nothing again."""

import shutil
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from olora_ray.model import attention
from olora_ray.train.loop import Trainer
from olora_ray.train.parallel import place_model
from olora_ray.train.self_test import check_adapters
from tests import tiny
from tests.crew import Crews
from tests.families import zoo
from tests.families.variants import ALL
from tests.refused import refused
from tests.train.test_recompute import measured

CPU = torch.device("cpu")
FAMILIES = ["llama", "qwen3", "gemma2", "gpt2", "qwen3_moe"]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def without_code() -> Iterator[None]:
    """Graphs are made, and split into forward and backward, but run as they are: C++ takes a minute per family."""
    with mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")):
        yield


def trainer(model: Any, on: bool, recompute: bool = False, **changes: Any) -> Trainer:
    made = tiny.trainer(tiny.decided(**changes), model=model)
    made.loss.compile_blocks, made.loss.recompute = on, recompute
    place_model(made.loss, made.config.cluster.strategy, CPU)
    tiny.moved(made)
    return made


def packs(first: int, count: int) -> Any:
    """Packed examples; no two micro-batches have the same length."""
    drawn = [
        np.random.default_rng(seed).integers(5, 17, 2 + seed % 3)
        for seed in range(first, first + count)
    ]
    return tiny.ListStore(
        [tiny.pack(*lengths.tolist(), seed=number) for number, lengths in enumerate(drawn)]
    )


def model_of(family: str) -> Any:
    attention.register()
    model = zoo.make(ALL[family])
    model.set_attn_implementation("eager" if family == "gemma2" else "segments")
    return model


def trained(
    family: str, on: bool, recompute: bool = False
) -> tuple[list[float], Tensor, list[str]]:
    made = trainer(model_of(family), on, recompute, adapter__dropout=0.1)
    layout = tiny.attention_of(made.loss.model)
    losses = [result.loss for result in tiny.steps(made, packs(0, 8), count=1, attention=layout)]
    graphs = counters["stats"]["unique_graphs"]
    losses += [
        result.loss for result in tiny.steps(made, packs(8, 12), count=4, start=1, attention=layout)
    ]
    assert (graphs > 0) == on
    assert (
        counters["stats"]["unique_graphs"] == graphs
    )  # neither later lengths nor further blocks have their own
    return losses, made.flat.vector.clone(), [*made.loss.state_dict()]


def off(one: Tensor, other: Tensor) -> float:
    # AdamW makes a large difference of a small one where a gradient is almost zero, so single numbers are not compared.
    return float((one - other).norm() / other.norm())


def assert_same(family: str, recompute: bool) -> None:
    losses, vector, names = trained(family, on=False)
    compiled = trained(family, on=True, recompute=recompute)
    assert compiled[0] == pytest.approx(losses, rel=1e-5)
    assert off(compiled[1], vector) < 1e-3
    assert compiled[2] == names


@pytest.mark.usefixtures("without_code")
def test_a_block_is_compiled_once_for_all_lengths() -> None:
    assert_same("llama", recompute=True)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recomputed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_compiled_code_has_the_same_losses(family: str, recompute: bool) -> None:
    assert_same(family, recompute)


def test_a_model_that_does_not_compile_is_refused() -> None:
    made = trainer(model_of("llama"), on=True)
    with (
        mock.patch.object(torch, "compile", side_effect=RuntimeError("no compiler")),
        refused("model.compile: set it to false; compiled, "),
    ):
        check_adapters(made.loss, made.adapted, list(packs(0, 4)), "segments", CPU, new=False)


def _steps(strategy: str, on: bool) -> tuple[list[float], Tensor, float, list[list[int]]]:
    changes = {
        "cluster__workers": 2,
        "cluster__strategy": strategy,
        "train__micro_batch": 1,
        "train__global_batch": 3,
    }
    with mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")):
        made = trainer(model_of("llama"), on, recompute=True, **changes)
        losses = [result.loss for result in tiny.steps(made, count=3)]
    return losses, *measured(made)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_workers_train_evaluate_and_answer(crew: Crews, strategy: str) -> None:
    without, compiled = (crew(2).run(_steps, strategy, on) for on in (False, True))
    assert compiled[0][0] == compiled[1][0]
    assert torch.equal(compiled[0][1], compiled[1][1])
    for one, other in zip(without, compiled, strict=True):
        assert other[0] == pytest.approx(one[0], rel=1e-5)
        assert off(other[1], one[1]) < 1e-3
        assert other[2] == pytest.approx(one[2], rel=1e-5)
        assert other[3] == one[3]
