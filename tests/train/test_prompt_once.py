"""The prompt of a pair goes through the model once: the losses and gradients are those of two whole segments."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from olora_ray.model import attention
from olora_ray.tokens.collate import PROMPT_ONCE, collate
from olora_ray.tokens.plan import CHOSEN, REJECTED, Pack
from olora_ray.train import reference
from olora_ray.train.held_out import held_out
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.self_test import choose_attention
from tests import tiny
from tests.said import said
from tests.varlen_on_cpu import varlen_on_cpu

ONCE = "segments" + PROMPT_ONCE
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def pair(prompt: int, chosen: int, rejected: int, seed: int = 0) -> Any:
    known = tiny.pack(prompt + chosen, prompt + rejected, seed=seed, prompt=prompt)
    ids = known.input_ids
    ids[prompt + chosen :][:prompt] = ids[:prompt]
    ids[prompt + chosen + prompt] = (ids[prompt] - 1) % tiny.VOCABULARY
    return replace(known, roles=(CHOSEN, REJECTED))


def joined(*packs: Any) -> Pack:
    roles = [pack.roles or (0,) * len(pack.segments) for pack in packs]
    return Pack(
        np.concatenate([pack.input_ids for pack in packs]),
        np.concatenate([pack.supervised for pack in packs]),
        sum((pack.segments for pack in packs), ()),
        sum(roles, ()),
    )


def packs() -> list[Pack]:
    """Pairs, between which there are rows."""
    row = tiny.pack(11, seed=7)
    return [
        joined(pair(20, 9, 5, seed=1), row, pair(3, 6, 8, seed=2)),
        joined(pair(40, 5, 3, seed=4), pair(17, 20, 9, seed=5)),
    ]


def trainer(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    given = {"train__objective": "pairs", "train__global_batch": 2, "train__clip": None}
    model = tiny.llama(dtype=dtype, attention="segments")
    return tiny.trainer(tiny.config(**given | changes), model=model)


def with_reference(known: Any, layout: str, given: list[Pack]) -> Any:
    rows = reference.measured(known, tiny.ListStore(given), layout)
    data = [replace(pack, reference=row) for pack, row in zip(given, rows, strict=True)]
    return tiny.ListStore(data)


def changed(pack: Pack, place: int) -> Pack:
    ids = pack.input_ids.copy()
    ids[place] = (ids[place] + 1) % tiny.VOCABULARY
    return replace(pack, input_ids=ids)


def test_the_prompt_is_there_once_and_what_both_answers_begin_with() -> None:
    same = pair(20, 9, 9)
    same.input_ids[29:] = same.input_ids[:29]
    given = [*packs(), same, changed(same, 29 + 23)]
    once, twice = collate(given, ONCE), collate(given, "segments")
    assert twice.tokens == 236 + 58 + 58
    assert once.tokens == twice.tokens - (20 + 3 + 40 + 17) - 28 - 23
    assert once.inputs["position_ids"][0, 29:34].tolist() == [20, 21, 22, 23, 24]
    assert torch.equal(once.labels, twice.labels)
    assert once.segments == twice.segments


@DTYPES
def test_losses_and_gradients_are_those_of_two_segments(dtype: torch.dtype) -> None:
    found = []
    for layout in ("segments", ONCE):
        data = with_reference(trainer(dtype), layout, packs())
        known = tiny.moved(trainer(dtype))
        losses = known.loss.each(collate(packs(), layout))
        result = held_out(known.loss, data, known.objective, layout, width=2)
        seen = tiny.gradients(known)
        next(tiny.steps(known, data, count=3, attention=layout))
        found.append((losses, result.loss, seen[0]))
    (losses, loss, gradient), (others, other, of_once) = found
    # torch can give a token of the prompt another last bit in a segment of another length.
    rounding = 1e-6 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(others, losses, rtol=rounding, atol=0)
    assert other == pytest.approx(loss, rel=rounding)
    assert float((of_once - gradient).norm() / gradient.norm()) < rounding


@DTYPES
def test_no_bit_of_an_answer_depends_on_the_other_one(dtype: torch.dtype) -> None:
    loss = SupervisedLoss(tiny.llama(dtype=dtype, attention="segments"))

    def losses(pack: Pack) -> tuple[torch.Tensor, ...]:
        batch = collate([pack], ONCE)
        return loss.each(batch).split(batch.segments)

    known = pair(20, 9, 5)
    chosen, rejected = losses(known)
    other_chosen, same_rejected = losses(changed(known, 25))
    assert not torch.equal(other_chosen, chosen)
    assert torch.equal(same_rejected, rejected)
    same_chosen, other_rejected = losses(changed(known, 51))
    assert torch.equal(same_chosen, chosen)
    assert not torch.equal(other_rejected, rejected)


@DTYPES
def test_the_first_loss_is_ln_2(dtype: torch.dtype) -> None:
    for known in (trainer(dtype, train__micro_batch=1), tiny.moved(trainer(dtype))):
        pairs = [pair(20, 9, 5, seed=1), joined(pair(3, 6, 8), pair(40, 5, 3))]
        data = with_reference(known, ONCE, pairs)
        result = next(tiny.steps(known, data, count=3, attention=ONCE))
        assert result.loss == torch.tensor(math.log(2)).item()
        assert result.means["pairs/margin"] == 0.0


def choose(model: Any, given: Any) -> Any:
    config = tiny.decided(train__objective="pairs")
    return choose_attention(SupervisedLoss(model), given, config, tiny.CPU)


@DTYPES
@pytest.mark.skipif(attention.kernel() is None, reason="needs a newer torch")
def test_a_run_with_pairs_takes_it_where_the_model_computes_the_same(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose(tiny.llama(dtype=dtype), packs()).layout == ONCE
    assert choose(tiny.llama(dtype=dtype), [tiny.pack(20, 9)]).layout == "segments"
    monkeypatch.setattr(attention, "candidates", lambda *_: ("varlen",))
    with varlen_on_cpu():
        assert choose(tiny.llama(dtype=dtype), packs()).layout == "varlen" + PROMPT_ONCE
    monkeypatch.setattr(attention, "candidates", lambda *_: ("sdpa",))
    assert choose(tiny.llama(dtype=dtype), packs()).layout == "sdpa"


@DTYPES
@pytest.mark.parametrize("lost", ["whole_rows", "cu_seq_lens_q"])
def test_a_model_that_does_not_pass_on_the_rows_has_the_prompt_twice(
    lost: str, dtype: torch.dtype
) -> None:
    model = tiny.llama(dtype=dtype, attention="segments")
    for layer in model.model.layers:
        layer.self_attn.forward = _without(layer.self_attn.forward, lost)
    with said() as lines:
        found = choose(model, packs())
    assert found.layout == "segments"
    assert any("both answers of a pair have a prompt of their own" in line for line in lines)


def _without(forward: Any, lost: str) -> Any:
    names = ("whole_rows", "own_places", lost)
    return lambda *given, **named: forward(
        *given, **{name: value for name, value in named.items() if name not in names}
    )
