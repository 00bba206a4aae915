"""EVA: the exact principal components of the run's first supervised tokens, for any number of workers."""

import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from olora_ray.adapter.initialise import InitReport
from olora_ray.adapter.inject import find_targets
from olora_ray.adapter.layer import Factors
from olora_ray.common import collectives
from olora_ray.common.errors import UserError
from olora_ray.config.schema import Adapter
from olora_ray.tokens.plan import Pack
from olora_ray.train import data_driven, layer_inputs
from olora_ray.train.data_driven import DataReport, eva_factors
from olora_ray.train.layer_inputs import first_tokens
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.parallel import place_model
from tests import tiny
from tests.crew import Crews
from tests.refused import refused

CPU = torch.device("cpu")
RANK = 4
Made = tuple[dict[str, Factors], InitReport, DataReport]


def settings(**changes: Any) -> Adapter:
    return Adapter(**({"method": "eva", "rank": RANK, "init_tokens": 96} | changes))


def make(
    attention: str = "segments", count: int = 8, at_once: int | None = None, **changes: Any
) -> Made:
    model = tiny.llama(attention=attention)
    if at_once is not None:
        layer_inputs.AT_ONCE = at_once
    return eva_factors(
        SupervisedLoss(model),
        find_targets(model, "all-linear", RANK),
        settings(**changes),
        store(count),
        CPU,
    )


def store(count: int = 8) -> Any:
    return tiny.store(count, seed=2)


def exact(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return right singular vectors and shares of the variance, by the SVD of the centred rows."""
    x = rows.double() - rows.double().mean(0)
    _, values, right = torch.linalg.svd(x, full_matrices=False)
    return right, values.square() / values.square().sum()


def recorded(model: Any, packs: list[Pack], limit: int) -> dict[str, Tensor]:
    """Return each layer's inputs at the first `limit` supervised tokens; each example runs alone."""
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
    """Return the sine of the largest angle between the spaces of the rows."""
    cosines = torch.linalg.svdvals(a.double() @ b.double().mT)
    return float((1 - cosines.min().clamp(max=1) ** 2).sqrt())


@pytest.mark.parametrize("attention", ["segments", "sdpa"])
def test_a0_is_the_exact_pca_of_the_first_supervised_tokens_of_packed_sequences(
    attention: str,
) -> None:
    found, _, about = make(attention)
    packs = store()
    rows = recorded(tiny.llama(), [packs[i] for i in range(8)], 96)
    offers = {name: exact(rows[name])[1][: 2 * RANK].tolist() for name in found}
    assert about.tokens == 96
    assert about.ranks == data_driven.redistributed(offers, len(found) * RANK)
    assert min(about.ranks.values()) < RANK < max(about.ranks.values())
    for name, item in found.items():
        assert item.b0 is None
        assert item.rank == about.ranks[name]
        torch.testing.assert_close(item.a0 @ item.a0.mT, torch.eye(item.rank), atol=1e-6, rtol=0)
        assert sine(item.a0, exact(rows[name])[0][: item.rank]) < 2e-4, name


def _bytes(**changes: Any) -> tuple[str, list[int], int, bytes]:
    found, report, about = make(**changes)
    parts = b"".join(item.a0.numpy().tobytes() for item in found.values())
    return (
        report.digest if collectives.world_size() == 1 else "",
        list(about.ranks.values()),
        about.sent,
        parts,
    )


def test_the_same_bytes_come_of_1_2_and_3_workers(crew: Crews) -> None:
    answers = [answer for workers in (1, 2, 3) for answer in crew(workers).run(_bytes)]
    assert len({parts for *_, parts in answers}) == 1
    assert len({tuple(ranks) for _, ranks, *_ in answers}) == 1
    assert answers[0][2] == 0
    assert answers[1][2] == answers[2][2] > 0


def _loss() -> SupervisedLoss:
    return SupervisedLoss(tiny.llama(attention="segments"))


def test_more_tokens_are_looked_at_until_they_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, _, about = make(init_tokens=128)
    assert about.tokens == 128
    mean, least = about.agreement
    assert 0 < least <= mean < 0.99
    monkeypatch.setattr(data_driven, "AGREEMENT", least / 2)
    early, _, sooner = make(init_tokens=128)
    assert sooner.tokens == 64
    assert sooner.sequences < about.sequences
    monkeypatch.undo()
    alone, _, _ = make(init_tokens=64)
    assert all(torch.equal(early[name].a0, item.a0) for name, item in alone.items())


def test_too_few_tokens_are_refused_in_one_line() -> None:
    with refused(
        "supervised tokens, but 48 components (rho x rank) need more than 48; use more data"
    ):
        make(count=1, rank=16, rho=3.0)


@pytest.mark.parametrize(("strategy", "layer"), [("ddp", 1), ("fsdp", 0)])
def test_activations_that_are_not_finite_stop_every_worker(
    crew: Crews, strategy: str, layer: int
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
    threading.Timer(0.1, lambda: setattr(growing, "arrived", 3)).start()
    assert first_tokens(growing, 60) == first_tokens(packs, 60)
    assert growing.total == 8


@given(
    st.lists(
        st.lists(st.floats(0, 1).map(lambda x: round(x, 1)), max_size=6), min_size=1, max_size=5
    ),
    st.integers(0, 30),
)
def test_ranks_are_a_count_of_the_largest_shares(shares: list[list[float]], budget: int) -> None:
    layers = {f"layer {i}": sorted(each, reverse=True) for i, each in enumerate(shares)}
    found = data_driven.redistributed(layers, budget)
    assert list(found) == list(layers)
    assert sum(found.values()) == min(budget, sum(map(len, layers.values())))
    kept = [layers[name][i] for name in layers for i in range(found[name])]
    left = [share for name in layers for share in layers[name][found[name] :]]
    assert not kept or not left or min(kept) >= max(left)
