"""LoRA-GA: the paper's formula of the exact gradient on the first supervised tokens, for any number of workers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from olora_ray.adapter.initialise import InitReport
from olora_ray.adapter.inject import find_targets, inject
from olora_ray.adapter.layer import Factors
from olora_ray.common.errors import UserError
from olora_ray.config.schema import Adapter
from olora_ray.tokens.plan import Pack
from olora_ray.train import data_driven
from olora_ray.train.data_driven import DataReport, gradient_factors
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.parallel import place_model
from tests import tiny
from tests.crew import Crew
from tests.families import zoo
from tests.families.variants import ALL
from tests.train.test_data_driven import sine

CPU = torch.device("cpu")
RANK, TOKENS = 4, 60
Made = tuple[dict[str, Factors], InitReport, DataReport]


def store() -> Any:
    return tiny.store(8, seed=2)


def settings(**changes: Any) -> Adapter:
    return Adapter(**({"method": "lora_ga", "rank": RANK, "init_tokens": TOKENS} | changes))


def make(
    strategy: str = "ddp", attention: str = "segments", at_once: int | None = None, **changes: Any
) -> Made:
    loss = SupervisedLoss(tiny.llama(attention=attention))
    place_model(loss, strategy, CPU)
    kept, data_driven.GRADIENTS_AT_ONCE = (
        data_driven.GRADIENTS_AT_ONCE,
        at_once or data_driven.GRADIENTS_AT_ONCE,
    )
    try:
        return gradient_factors(
            loss, find_targets(loss.model, "all-linear", RANK), settings(**changes), store(), CPU
        )
    finally:
        data_driven.GRADIENTS_AT_ONCE = kept


def by_autograd(packs: list[Pack], limit: int) -> dict[str, Tensor]:
    """Return the gradients of the weights themselves, for the summed loss of the first `limit` supervised tokens."""
    model = tiny.llama().requires_grad_(True)
    left = limit
    for pack in tiny.unpacked(packs):
        ids = torch.from_numpy(pack.input_ids.astype(np.int64))
        places = torch.from_numpy(np.flatnonzero(pack.supervised))[:left]
        left -= len(places)
        if len(places):
            F.cross_entropy(
                model(ids[None]).logits[0, places - 1], ids[places], reduction="sum"
            ).backward()
    names = find_targets(model, "all-linear", RANK)
    return {name: model.get_submodule(name).weight.grad for name in names}


@pytest.mark.parametrize("attention", ["segments", "sdpa"])
def test_factors_are_the_papers_formula_of_the_exact_gradient(attention: str) -> None:
    found, report, about = make(attention=attention, gamma=64.0)
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


def _bytes(at_once: int | None = None) -> tuple[int, int, bytes]:
    found, _, about = make(at_once=at_once)
    parts = b"".join(
        part.numpy().tobytes()
        for item in found.values()
        for part in (item.a0, item.b0)
        if part is not None
    )
    return about.sent, about.held, parts


def test_the_same_bytes_come_of_1_2_and_3_workers(crew: Callable[[int], Crew]) -> None:
    answers = [answer for workers in (1, 2, 3) for answer in crew(workers).run(_bytes)]
    assert len({parts for *_, parts in answers}) == 1
    assert answers[0][0] == 0
    assert answers[0][1] > answers[1][1] > answers[3][1], "each holds its part"


def test_layers_that_do_not_fit_together_are_made_one_part_after_the_other() -> None:
    whole, parts = _bytes(), _bytes(at_once=2**14)
    assert parts[2] == whole[2]
    assert parts[1] < whole[1] / 3


def test_nothing_is_left_on_the_base_and_the_start_is_the_base() -> None:
    model = tiny.llama(attention="segments")
    loss = SupervisedLoss(model)
    found, *_ = gradient_factors(
        loss, find_targets(model, "all-linear", RANK), settings(), store(), CPU
    )
    assert all(item.grad is None and not item.requires_grad for item in model.parameters())
    from olora_ray.tokens.collate import collate

    batch = collate([store()[0]], "segments")
    before = loss.each(batch)
    inject(model, found, 2.0)
    assert torch.equal(loss.each(batch), before)


def test_experts_and_data_without_supervised_tokens_are_refused() -> None:
    model = zoo.make(ALL["mixtral"])
    with pytest.raises(UserError, match="is a stack of experts"):
        gradient_factors(
            SupervisedLoss(model), find_targets(model, "all-linear", 2), settings(), store(), CPU
        )
    empty: Any = tiny.ListStore(
        [Pack(store()[0].input_ids, np.zeros(len(store()[0].input_ids), bool), (4,))]
    )
    model = tiny.llama()
    with pytest.raises(UserError, match="the training data has 0 supervised tokens"):
        gradient_factors(
            SupervisedLoss(model), find_targets(model, ("q_proj",), RANK), settings(), empty, CPU
        )
