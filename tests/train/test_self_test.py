"""The self-test finds mistakes in a model without knowing its family, and names the remedy."""

import copy
import re
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from olora_ray.common.errors import UserError
from olora_ray.model import attention
from olora_ray.model.packing import why_apart
from olora_ray.tokens.collate import collate
from olora_ray.train.loss import SelfTest, SupervisedLoss
from olora_ray.train.self_test import check_adapters, choose_attention
from tests import tiny
from tests.families import zoo
from tests.families.variants import ALL
from tests.refused import refused
from tests.tiny import SMALL, of_kind
from tests.varlen_on_cpu import varlen_on_cpu

CPU = torch.device("cpu")
PACKED = [tiny.pack(9, 7), tiny.pack(12)]
APART = [tiny.pack(9), tiny.pack(7), tiny.pack(12)]
SINKS = SMALL | {
    "num_local_experts": 4,
    "head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "initializer_range": 0.2,
}
"""Of a GPT-OSS, whose masks know nothing of positions."""
NEWER = pytest.mark.skipif(attention.kernel() is None, reason="needs a newer torch")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def chosen(made: Any, packs: Any = PACKED, **changes: Any) -> SelfTest:
    attention.register()
    packing = {"data__packing": why_apart(made) is None}
    return choose_attention(SupervisedLoss(made), packs, tiny.decided(**(packing | changes)), CPU)


@DTYPES
def test_a_llama_passes_with_the_fastest(dtype: torch.dtype) -> None:
    found = chosen(tiny.llama(dtype=dtype))
    assert (found.attention, found.passed_over, found.given_masks) == ("segments", {}, False)
    assert found.differences.change == 0
    line = (
        r"self-test: passed with attention=segments, in .* s; .* up to rounding "
        r"\(relative difference .*, allowed .*\)"
    )
    assert re.fullmatch(line, found.line())  # the loss's difference, of 0.09, was read as an error


@DTYPES
def test_a_model_that_makes_its_masks_of_nothing_is_given_them(dtype: torch.dtype) -> None:
    found = chosen(of_kind("gpt_oss", SINKS).to(dtype))
    assert (found.attention, found.given_masks) == ("eager", True)


def test_examples_that_may_share_a_sequence_are_tested_so_although_the_first_ones_do_not() -> None:
    attention.register()
    loss = SupervisedLoss(of_kind("gpt_oss", SINKS))
    found = choose_attention(loss, APART, tiny.decided(), CPU)
    assert (found.attention, found.given_masks) == ("eager", True)
    together = loss.each(collate([tiny.pack(9, 7, prompt=1)], found.attention))[8:]
    alone = loss.each(collate(tiny.unpacked([tiny.pack(9, 7, prompt=1)])[1:], found.attention))
    assert torch.allclose(together, alone, atol=1e-4), "a later sequence with two of them"
    apart = choose_attention(loss, APART, tiny.decided(data__packing=False), CPU)
    assert (apart.attention, apart.given_masks) == ("eager", False)


def test_a_window_is_kept_although_the_first_examples_are_shorter() -> None:
    made = of_kind("mistral", SMALL | {"sliding_window": 16, "max_position_embeddings": 64})
    loss = SupervisedLoss(made)
    found = choose_attention(
        loss, [tiny.pack(9, 7), tiny.pack(12)], tiny.decided(data__max_length=64), CPU
    )
    assert found.attention == "sdpa"
    assert "window" in found.passed_over["segments"]
    assert torch.isfinite(loss(collate([tiny.pack(40)], found.attention)))
    short = choose_attention(
        loss, [tiny.pack(9, 7), tiny.pack(12)], tiny.decided(data__max_length=16), CPU
    )
    assert short.attention == "segments"


@pytest.fixture
def varlen_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefer varlen, as on a GPU without flash-attn."""
    monkeypatch.setattr(attention, "candidates", lambda *_: ("varlen", "sdpa", "eager"))


@NEWER
@DTYPES
@pytest.mark.usefixtures("varlen_first")
def test_a_kernel_that_fails_in_the_first_forward_is_passed_over(dtype: torch.dtype) -> None:
    found = chosen(
        tiny.llama(attention="varlen", dtype=dtype)
    )  # this kernel has no version for CPUs
    assert found.attention == "sdpa"
    assert "its forward fails: NotImplementedError: Could not run" in found.passed_over["varlen"]


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("FlashAttention backward for head dim > 192 needs another GPU")


@pytest.mark.usefixtures("varlen_first")
def test_a_kernel_that_fails_in_the_backward_pass_is_passed_over() -> None:
    def attend(*given: Any, **named: Any) -> Any:
        output, _ = attention.segment_attention(*given, **named)
        return NoBackward.apply(output), None  # type: ignore[no-untyped-call]

    with mock.patch.object(attention, "varlen_attention", attend):
        found = chosen(tiny.llama(attention="varlen"))
    attention.register()
    assert found.attention == "sdpa"
    assert "its backward pass fails: RuntimeError" in found.passed_over["varlen"]


@NEWER
@DTYPES
@pytest.mark.usefixtures("varlen_first")
def test_varlen_passes_where_it_does_what_the_model_does(dtype: torch.dtype) -> None:
    long = [tiny.pack(40, 7), tiny.pack(30, 12)]
    soft = SMALL | {
        "head_dim": 8,
        "sliding_window": 4096,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    with varlen_on_cpu():
        assert chosen(tiny.llama(attention="varlen", dtype=dtype)).attention == "varlen"
        window = chosen(of_kind("mistral", SMALL | {"sliding_window": 8}).to(dtype), long)
        capped = chosen(of_kind("gemma2", soft).to(dtype), long)
        untold = chosen(of_kind("nemotron", SMALL | {"initializer_range": 0.2}).to(dtype))
    with varlen_on_cpu(wider=3):
        wrong = chosen(
            of_kind("mistral", SMALL | {"sliding_window": 8, "initializer_range": 0.2}).to(dtype),
            long,
        )
    assert (window.attention, window.passed_over) == ("varlen", {})
    assert capped.attention in ("sdpa", "eager")
    assert "softcap or attention sinks" in capped.passed_over["varlen"]
    assert "where an example ends" in untold.passed_over["varlen"]
    assert wrong.attention == "sdpa"
    assert "the output of model.layers.0.self_attn differs by" in wrong.passed_over["varlen"]


@DTYPES
@pytest.mark.parametrize("kind", ["lfm2", "mamba"])
def test_a_state_that_runs_over_the_borders_is_refused_with_what_helps(
    kind: str, dtype: torch.dtype
) -> None:
    sizes = SMALL | {"full_attn_idxs": [1]} if kind == "lfm2" else {**SMALL, "state_size": 4}
    made = of_kind(kind, sizes).to(dtype)
    for parameter in made.parameters():  # so that what is carried over matters
        parameter.data.mul_(3 if parameter.dim() > 1 else 1)
    with refused("set data.packing: false"):
        chosen(made)
    assert chosen(made, APART).attention in ("sdpa", "eager")


def test_a_state_is_never_laid_out_in_one_row() -> None:
    made = of_kind("lfm2", SMALL | {"full_attn_idxs": [1]})
    assert chosen(made, APART).passed_over == {}
    with refused("keeps a state"):
        chosen(made, APART, model__attention="segments")


def test_the_attention_that_is_named_is_refused_with_one_that_passes() -> None:
    with refused("set model.attention: sdpa"):
        chosen(
            of_kind("mistral", SMALL | {"sliding_window": 8}),
            [tiny.pack(40, 7)],
            model__attention="segments",
        )


def adapted(settings: Any = None) -> Any:
    return tiny.trainer(settings or tiny.decided())


def test_adapters_that_start_elsewhere_are_found() -> None:
    trainer = adapted()
    trainer.flat.vector[3] = 0.5
    check_adapters(trainer.loss, trainer.adapted, PACKED, "segments", CPU, new=False)
    with pytest.raises(UserError):
        check_adapters(trainer.loss, trainer.adapted, PACKED, "segments", CPU, new=True)


class Mixture(torch.nn.Module):
    """Experts that are separate modules, as in a model's own code; all tokens go to the expert `chosen`."""

    def __init__(self, mlp: torch.nn.Module, chosen: int | None) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(copy.deepcopy(mlp) for _ in range(4))
        self.chosen = chosen

    def forward(self, x: torch.Tensor) -> Any:
        return x if self.chosen is None else self.experts[self.chosen](x)


def test_experts_to_which_no_token_of_the_examples_goes_are_no_mistake() -> None:
    for chosen_expert in (2, None):
        made = tiny.llama(attention="segments")
        made.model.layers[0].mlp = Mixture(made.model.layers[0].mlp, chosen_expert)
        trainer = tiny.trainer(tiny.decided(), model=made)
        assert "model.layers.0.mlp.experts.3.up_proj" in trainer.adapted
        if chosen_expert is not None:
            check_adapters(trainer.loss, trainer.adapted, PACKED, "segments", CPU, new=True)
            continue
        with refused("mlp.experts.0.gate_proj, "):
            check_adapters(trainer.loss, trainer.adapted, PACKED, "segments", CPU, new=True)


def test_a_row_beside_a_longer_one_of_other_positions_is_refused() -> None:
    made = of_kind("phi3", tiny.LONG_ROPE | {"initializer_range": 0.2})
    loss, packs = SupervisedLoss(made), [tiny.pack(40, prompt=1), tiny.pack(128, prompt=1, seed=1)]
    alone, beside = loss.each(collate(packs[:1], "sdpa")), loss.each(collate(packs, "sdpa"))[:39]
    assert (alone - beside).abs().mean() > 0.01  # it does depend on it
    with refused("data.max_length=128: "):
        choose_attention(loss, packs, tiny.decided(data__max_length=128), CPU)
    apart = tiny.decided(data__max_length=128, train__micro_batch=1, data__packing=False)
    assert choose_attention(loss, packs, apart, CPU).attention == "segments"


def test_attention_that_is_scaled_by_the_place_in_a_row_is_not_laid_out_in_one() -> None:
    variant = ALL["llama4_text"]
    made = zoo.make(replace(variant, sizes=variant.sizes | {"floor_scale": 64}), attention="sdpa")
    loss, packs = SupervisedLoss(made), [tiny.pack(48, prompt=1, seed=seed) for seed in range(4)]
    alone, beside = (
        loss.each(collate(packs[3:], "sdpa")),
        loss.each(collate(packs, "segments"))[-47:],
    )
    assert (alone - beside).abs().mean() > 1e-3  # it does depend on the place
    wide, narrow = (
        tiny.decided(data__max_length=48),
        tiny.decided(data__max_length=48, train__micro_batch=1),
    )
    assert choose_attention(loss, packs, narrow, CPU).attention == "segments"
    assert choose_attention(loss, packs, wide, CPU).attention == "sdpa"
    assert torch.allclose(loss.each(collate(packs, "sdpa"))[-47:], alone, atol=1e-5)
    named = tiny.decided(data__max_length=48, model__attention="segments")
    with refused("by the position in a row"):
        choose_attention(loss, packs, named, CPU)
