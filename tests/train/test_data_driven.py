"""EVA and LoRA-GA: the exact components, or gradient, of the run's first supervised tokens, whoever computes them.

Over several batches PEFT's incremental, truncated decomposition is not the one of the data, and its ranks of layers
with equal inputs depend on an unstable sort: of EVA one batch is compared, in spaces and each group's ranks.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from olora_ray.adapter.initialise import InitReport, check
from olora_ray.adapter.inject import find_targets, inject
from olora_ray.adapter.layer import Factors
from olora_ray.adapter.methods import eva
from olora_ray.common import collectives
from olora_ray.common.errors import UserError
from olora_ray.config.schema import Adapter
from olora_ray.tokens.collate import collate
from olora_ray.tokens.store import Pack
from olora_ray.train import calibration, data_driven
from olora_ray.train.calibration import first_tokens
from olora_ray.train.data_driven import DataReport, eva_factors, gradient_factors
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.parallel import place_model
from tests import tiny
from tests.crew import Crew
from tests.families import zoo
from tests.families.variants import ALL

CPU = torch.device("cpu")
RANK = 4
Made = tuple[dict[str, Factors], InitReport, DataReport]


def settings(**changes: Any) -> Adapter:
    return Adapter(**({"method": "eva", "rank": RANK, "init_tokens": 96} | changes))


def make(attention: str = "segments", count: int = 8, at_once: int | None = None, **changes: Any) -> Made:
    model = tiny.llama(attention=attention)
    if at_once is not None:
        calibration.AT_ONCE = at_once
    return eva_factors(
        SupervisedLoss(model), find_targets(model, "all-linear", RANK), settings(**changes), store(count), CPU
    )


def store(count: int = 8) -> Any:
    return tiny.store(count, seed=2)


def exact(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Right singular vectors and shares of the variance, by the SVD of the centred rows."""
    x = rows.double() - rows.double().mean(0)
    _, values, right = torch.linalg.svd(x, full_matrices=False)
    return right, values.square() / values.square().sum()


def recorded(model: Any, packs: list[Pack], limit: int) -> dict[str, Tensor]:
    """Each layer's inputs at the first `limit` supervised tokens, one example at a time through the whole model."""
    seen: dict[str, list[Tensor]] = {}
    mask: Tensor = torch.empty(0)
    handles = [
        module.register_forward_pre_hook(
            lambda _, x, name=name: seen.setdefault(name, []).append(x[0][0][mask].clone())
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    for pack in tiny.unpacked(packs):
        mask = torch.from_numpy(pack.supervised)
        model(torch.from_numpy(pack.input_ids.astype(np.int64))[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts)[:limit] for name, parts in seen.items()}


def sine(a: Tensor, b: Tensor) -> float:
    """Of the largest angle between the spaces of the rows."""
    cosines = torch.linalg.svdvals(a.double() @ b.double().mT)
    return float((1 - cosines.min().clamp(max=1) ** 2).sqrt())


@pytest.mark.parametrize("attention", ["segments", "sdpa"])
def test_a0_is_the_exact_pca_of_the_first_supervised_tokens_of_packed_sequences(attention: str) -> None:
    found, _, about = make(attention)
    packs = store()
    rows = recorded(tiny.llama(), [packs[i] for i in range(8)], 96)
    offers = {name: exact(rows[name])[1][: 2 * RANK].tolist() for name in found}
    assert about.tokens == 96
    assert about.ranks == eva.ranks(offers, len(found) * RANK)
    assert min(about.ranks.values()) < RANK < max(about.ranks.values())
    for name, item in found.items():
        assert item.b0 is None
        assert item.rank == about.ranks[name]
        torch.testing.assert_close(item.a0 @ item.a0.mT, torch.eye(item.rank), atol=1e-6, rtol=0)
        assert sine(item.a0, exact(rows[name])[0][: item.rank]) < 2e-4, name


def _bytes(**changes: Any) -> tuple[str, list[int], int, bytes]:
    found, report, about = make(**changes)
    parts = b"".join(item.a0.numpy().tobytes() for item in found.values())
    return report.digest if collectives.world_size() == 1 else "", list(about.ranks.values()), about.sent, parts


def test_the_same_bytes_come_of_1_2_and_3_workers(crew: Callable[[int], Crew]) -> None:
    answers = [answer for workers in (1, 2, 3) for answer in crew(workers).run(_bytes)]
    assert len({parts for *_, parts in answers}) == 1
    assert len({tuple(ranks) for _, ranks, *_ in answers}) == 1
    assert answers[0][2] == 0
    assert answers[1][2] == answers[2][2] > 0


def _in_small_parts() -> tuple[int, bytes]:
    whole, parts = _bytes(), _bytes(at_once=4096)
    calibration.AT_ONCE = 2**26
    return whole[2] - parts[2], b"" if whole[3] == parts[3] else parts[3]


def test_parts_that_are_sent_after_each_other_make_the_same_bytes(crew: Callable[[int], Crew]) -> None:
    assert crew(2).run(_in_small_parts) == [(0, b"")] * 2


def _loss() -> SupervisedLoss:
    return SupervisedLoss(tiny.llama(attention="segments"))


def test_more_tokens_are_looked_at_until_they_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, about = make(init_tokens=128)
    assert about.tokens == 128
    assert about.agreement is not None
    mean, least = about.agreement
    assert 0 < least <= mean < 0.99
    assert f"half of them span {mean:.0%} of its space ({least:.0%} at least)" in about.line("eva")
    monkeypatch.setattr(data_driven, "AGREEMENT", least / 2)
    early, _, sooner = make(init_tokens=128)
    assert sooner.tokens == 64
    assert sooner.sequences < about.sequences
    monkeypatch.undo()
    alone, _, _ = make(init_tokens=64)
    assert all(torch.equal(early[name].a0, item.a0) for name, item in alone.items())


def test_too_few_tokens_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"the training data has \d+ supervised tokens, and 48 components") as caught:
        make(count=1, rank=16, rho=3.0)
    assert str(caught.value).endswith(
        " (rho x rank) need more than 48; use more data, lower adapter.rank or adapter.rho, or use another method"
    )


def test_experts_are_refused_by_name() -> None:
    model = zoo.make(ALL["mixtral"])
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.experts\.\w+ is a stack of experts"):
        eva_factors(SupervisedLoss(model), find_targets(model, "all-linear", 2), settings(rank=2), store(), CPU)
    names = ("q_proj", "o_proj")
    found, *_ = eva_factors(SupervisedLoss(model), find_targets(model, names, 2), settings(rank=2), store(), CPU)
    assert len(found) == 4


def test_a_layer_that_no_text_reaches_is_named() -> None:
    model = tiny.llama(attention="segments")
    targets = find_targets(model, ("q_proj",), RANK)
    spare = torch.nn.Linear(8, 8)
    targets["spare"] = type(next(iter(targets.values())))(spare, "weight", False)
    with pytest.raises(UserError, match="the input of spare at each token, and that layer is not used for text"):
        eva_factors(SupervisedLoss(model), targets, settings(), store(), CPU)


@pytest.mark.parametrize(("strategy", "layer"), [("ddp", 1), ("fsdp", 0)])
def test_activations_that_are_not_finite_stop_every_worker(
    crew: Callable[[int], Crew], strategy: str, layer: int
) -> None:
    answers = crew(2).run(_poisoned, strategy, layer)
    assert [type(answer) for answer in answers] == [UserError] * 2
    assert {str(answer) for answer in answers} == {
        f"model.name: the input of model.layers.{layer}.self_attn.q_proj has NaN or infinite values on the training"
        " data"
    }


def _poisoned(strategy: str, layer: int) -> None:
    loss = _loss()
    token = int(store()[1].input_ids[0])  # of the second sequence: the second worker's
    embedding = loss.model.model.embed_tokens.weight  # type: ignore[union-attr]
    embedding.data[token] = torch.nan
    place_model(loss, strategy, CPU)
    targets = find_targets(loss.model, (f"layers.{layer}.self_attn.q_proj",), RANK)
    eva_factors(loss, targets, settings(), store(), CPU)


def test_a_growing_store_is_waited_for_and_decides_nothing() -> None:
    packs = store()
    growing = tiny.ListStore([packs[i] for i in range(8)], sizes=[1, 2, 5], arrived=1)
    looks = []

    def waiting(shard: int, shards: int) -> None:
        looks.append((shard, shards))
        growing.arrived = 3

    assert first_tokens(growing, 60, waiting) == first_tokens(packs, 60)  # type: ignore[arg-type]
    assert looks


@given(
    st.lists(st.lists(st.floats(0, 1).map(lambda x: round(x, 1)), max_size=6), min_size=1, max_size=5),
    st.integers(0, 30),
)
def test_ranks_are_a_count_of_the_largest_shares(shares: list[list[float]], budget: int) -> None:
    layers = {f"layer {i}": sorted(each, reverse=True) for i, each in enumerate(shares)}
    found = eva.ranks(layers, budget)
    assert list(found) == list(layers)
    assert sum(found.values()) == min(budget, sum(map(len, layers.values())))
    kept = [layers[name][i] for name in layers for i in range(found[name])]
    left = [share for name in layers for share in layers[name][found[name] :]]
    assert not kept or not left or min(kept) >= max(left)


def test_of_equal_shares_the_earlier_component_goes_first_then_the_earlier_layer() -> None:
    shares = [0.3, 0.3, 0.2]
    assert eva.ranks({"b": shares, "a": shares}, 3) == {"b": 2, "a": 1}
    assert eva.ranks({"b": shares, "a": shares[:1]}, 2) == {"b": 1, "a": 1}


@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 12), st.integers(0, 100))
def test_components_are_those_of_the_svd(tokens: int, n: int, count: int, seed: int) -> None:
    rows = torch.randn(tokens, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows[:, 0] *= 3
    found = eva.principal(rows, count)
    _, shares = exact(rows)
    size = min(count, tokens - 1, n)
    assert found.vectors.shape == (size, n)
    torch.testing.assert_close(torch.tensor(found.shares), shares[:size], atol=1e-6, rtol=0, check_dtype=False)
    torch.testing.assert_close(found.vectors @ found.vectors.mT, torch.eye(size).double(), atol=1e-9, rtol=0)
    projected = (found.vectors @ (rows - rows.mean(0)).mT).square().sum(1)
    torch.testing.assert_close(projected / (rows - rows.mean(0)).square().sum(), shares[:size], atol=1e-9, rtol=0)


RANK = 4
LENGTH, PROMPT, ROWS = 24, 6, 8
ANGLE, SHARE = 5e-3, 1e-3
"""PEFT's own error, of svd_lowrank with four iterations, is 3e-4 and 1e-5."""


def packs() -> list[Pack]:
    """Tokens as frequent as words are: with even ones PEFT's few iterations would not tell directions apart."""
    draws = np.random.default_rng(0).zipf(1.6, (ROWS, LENGTH)) % (tiny.VOCABULARY - 2) + 2
    supervised = np.arange(LENGTH) >= PROMPT
    return [Pack(ids.astype(np.int32), supervised, (LENGTH,)) for ids in draws]


def batch() -> dict[str, Tensor]:
    ids = torch.from_numpy(np.stack([pack.input_ids for pack in packs()]).astype(np.int64))
    supervised = torch.from_numpy(np.stack([pack.supervised for pack in packs()]))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(~supervised, -100)}


def of_peft(rho: float) -> dict[str, Tensor]:
    from peft import EvaConfig, LoraConfig, get_eva_state_dict

    names = list(find_targets(tiny.llama(), "all-linear", RANK))
    config = LoraConfig(r=RANK, init_lora_weights="eva", target_modules=names, eva_config=EvaConfig(rho=rho))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = get_eva_state_dict(tiny.llama(), [batch()], config, show_progress_bar=False)
    return {name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): part for name, part in found.items()}


@pytest.mark.parametrize("rho", [2.0, 3.0])
def test_spaces_and_ranks_are_pefts_of_one_batch(rho: float) -> None:
    model: Any = tiny.llama(attention="segments")
    targets = find_targets(model, "all-linear", RANK)
    settings = Adapter(method="eva", rank=RANK, rho=rho, init_tokens=10_000)
    ours, _, about = eva_factors(
        SupervisedLoss(model),
        targets,
        settings,
        tiny.ListStore(packs()),
        torch.device("cpu"),  # type: ignore[arg-type]
    )
    theirs = of_peft(rho)
    assert about.tokens == ROWS * (LENGTH - PROMPT)
    assert sum(len(part) for part in theirs.values()) == sum(about.ranks.values()) == RANK * len(targets)
    for layer in range(2):
        for kinds in (("q", "k", "v"), ("o",), ("gate", "up"), ("down",)):
            block = "self_attn" if kinds[0] in "qo" else "mlp"
            names = [f"model.layers.{layer}.{block}.{kind}_proj" for kind in kinds]
            assert sorted(len(theirs[name]) for name in names) == sorted(about.ranks[name] for name in names)
            for name in names:
                size = min(len(theirs[name]), about.ranks[name])
                assert sine(ours[name].a0[:size], theirs[name][:size]) < ANGLE, name


TOKENS = 60


def ga_settings(**changes: Any) -> Adapter:
    return Adapter(**({"method": "lora_ga", "rank": RANK, "init_tokens": TOKENS} | changes))


def ga_factors(attention: str = "segments", at_once: int | None = None, **changes: Any) -> Made:
    loss = SupervisedLoss(tiny.llama(attention=attention))
    targets = find_targets(loss.model, "all-linear", RANK)
    before, data_driven.GRADIENTS_AT_ONCE = data_driven.GRADIENTS_AT_ONCE, at_once or data_driven.GRADIENTS_AT_ONCE
    try:
        return gradient_factors(loss, targets, ga_settings(**changes), store(), CPU)
    finally:
        data_driven.GRADIENTS_AT_ONCE = before


def by_autograd(packs: list[Pack], limit: int) -> dict[str, Tensor]:
    """Gradients of the weights themselves, for the summed loss of the first `limit` supervised tokens."""
    model = tiny.llama().requires_grad_(True)
    left = limit
    for pack in tiny.unpacked(packs):
        ids = torch.from_numpy(pack.input_ids.astype(np.int64))
        places = torch.from_numpy(np.flatnonzero(pack.supervised))[:left]
        left -= len(places)
        if len(places):
            F.cross_entropy(model(ids[None]).logits[0, places - 1], ids[places], reduction="sum").backward()
    names = find_targets(model, "all-linear", RANK)
    return {name: model.get_submodule(name).weight.grad for name in names}


@pytest.mark.parametrize("attention", ["segments", "sdpa"])
def test_factors_are_the_papers_formula_of_the_exact_gradient(attention: str) -> None:
    found, report, about = ga_factors(attention=attention, gamma=64.0)
    assert about.tokens == TOKENS
    assert report.deficient == ()
    packs = store()
    for name, gradient in by_autograd([packs[i] for i in range(8)], TOKENS).items():
        u, values, v = torch.linalg.svd(gradient.double(), full_matrices=False)
        size = gradient.shape[0] ** 0.25 / 8.0
        a0, b0 = found[name].a0, found[name].b0
        assert b0 is not None
        torch.testing.assert_close(a0.norm(dim=1), torch.full((RANK,), size))
        torch.testing.assert_close(b0.norm(dim=0), torch.full((RANK,), size))
        gap = 1e-4 * float(values[0] / (values[RANK - 1] - values[RANK]).clamp(min=1e-9))
        assert sine(a0 / size, v[:RANK]) < max(1e-4, gap), name
        both = torch.cat([u[:, :RANK].mT, b0.double().mT / size])  # U[:, :r] and B0 are U[:, :2r]
        gap = 1e-4 * float(values[0] / (values[2 * RANK - 1] - values[2 * RANK]).clamp(min=1e-9))
        assert sine(both, u[:, : 2 * RANK].mT) < max(2e-3, gap), name


def _ga_bytes(at_once: int | None = None) -> tuple[int, int, bytes]:
    found, _, about = ga_factors(at_once=at_once)
    parts = b"".join(
        part.numpy().tobytes() for item in found.values() for part in (item.a0, item.b0) if part is not None
    )
    return about.sent, about.held, parts


def test_the_same_gradients_come_of_1_2_and_3_workers(crew: Callable[[int], Crew]) -> None:
    answers = [answer for workers in (1, 2, 3) for answer in crew(workers).run(_ga_bytes)]
    assert len({parts for *_, parts in answers}) == 1
    assert answers[0][0] == 0
    assert answers[0][1] > answers[1][1] > answers[3][1], "each holds its part"


def test_layers_that_do_not_fit_together_are_made_one_part_after_the_other() -> None:
    whole, parts = _ga_bytes(), _ga_bytes(at_once=2**14)
    assert parts[2] == whole[2]
    assert parts[1] < whole[1] / 3


def test_nothing_is_left_on_the_base_and_the_start_is_the_base() -> None:
    model = tiny.llama(attention="segments")
    loss = SupervisedLoss(model)
    found, *_ = gradient_factors(loss, find_targets(model, "all-linear", RANK), ga_settings(), store(), CPU)
    assert all(item.grad is None and not item.requires_grad for item in model.parameters())
    batch = collate([store()[0]], "segments")
    before = loss.each(batch)
    inject(model, found, 2.0)
    assert torch.equal(loss.each(batch), before)


def test_a_rank_above_half_of_a_layer_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"adapter\.rank=17 is too large for k \(32 x 64\) .* use at most 16, or leave"):
        check({"q": (64, 64), "k": (32, 64)}, "lora_ga", 17)
    check({"k": (32, 64)}, "lora_ga", 16)


def test_experts_and_data_without_supervised_tokens_are_refused() -> None:
    model = zoo.make(ALL["mixtral"])
    with pytest.raises(UserError, match="is a stack of experts"):
        gradient_factors(SupervisedLoss(model), find_targets(model, "all-linear", 2), ga_settings(), store(), CPU)
    empty: Any = tiny.ListStore([Pack(store()[0].input_ids, np.zeros(len(store()[0].input_ids), bool), (4,))])
    model = tiny.llama()
    with pytest.raises(UserError, match="the training data has 0 supervised tokens"):
        gradient_factors(SupervisedLoss(model), find_targets(model, ("q_proj",), RANK), ga_settings(), empty, CPU)
