"""Preference pairs: the first loss is ln 2 to the bit, the gradient is that of plain autograd, whatever the split."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from olora_ray.adapter.methods import method_named
from olora_ray.config import tables
from olora_ray.tokens.collate import collate
from olora_ray.tokens.plan import CHOSEN, DOWN, REJECTED, UP
from olora_ray.train import reference
from olora_ray.train.held_out import held_out
from olora_ray.train.layer_inputs import first_tokens, right_answers
from olora_ray.train.objectives import pairs
from olora_ray.train.self_test import check_pair
from tests import tiny
from tests.families import oracle
from tests.refused import refused

METHODS = [name for name in tables.METHODS.own if method_named(name).needs == "weight"]


def pair(*lengths: int, seed: int = 0) -> Any:
    """A pack of pairs, (chosen, rejected, chosen, ...) with three common tokens, and of rows where a length is 0."""
    known = tiny.pack(*[length for length in lengths if length], seed=seed)
    roles: list[int] = []
    for number, length in enumerate(lengths):
        if not length:
            roles[-1] = 0
        else:
            roles.append((CHOSEN, REJECTED)[number % 2])
    return replace(known, roles=tuple(roles))


def packs() -> list[Any]:
    return [pair(9, 7, seed=1), pair(12, 0, 8, 11, seed=2), pair(6, 0, seed=3), pair(10, 14, 5, 9)]


def trainer(**changes: Any) -> Any:
    given = {"train__objective": "pairs", "train__global_batch": 4, "train__clip": None, **changes}
    return tiny.trainer(tiny.config(**given))


def store(trainer: Any) -> Any:
    """The packs with their reference, as the adapter is now."""
    known = tiny.ListStore(packs())
    rows = reference.measured(trainer, known, "segments")
    given = [replace(pack, reference=losses) for pack, losses in zip(packs(), rows, strict=True)]
    return tiny.ListStore(given)


def expected(model: Any, train: Any, references: list[float]) -> torch.Tensor:
    """The mean loss, from the logits of the model alone."""
    alone = tiny.unpacked(packs())
    losses = torch.stack([oracle.losses(model, [each]).double().sum() for each in alone])
    gains = torch.tensor(references, dtype=torch.float64) - losses
    roles = [role for pack in packs() for role in pack.roles]
    tokens = torch.tensor([int(each.supervised.sum()) for each in alone])
    total: Any = 0.0
    for number, role in enumerate(roles):
        if role == CHOSEN:
            total += -F.logsigmoid(train.beta * (gains[number] - gains[number + 1]))
    for role, factor in ((0, 1.0), (CHOSEN, train.chosen)):
        of_role = [number for number, each in enumerate(roles) if each == role]
        total += factor * len(of_role) * losses[of_role].sum() / tokens[of_role].sum()
    return total / len([role for role in roles if role != REJECTED])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_the_first_loss_is_the_float_nearest_to_ln_2(method: str, dtype: torch.dtype) -> None:
    given = tiny.config(
        adapter__method=method,
        train__objective="pairs",
        train__global_batch=2,
        train__micro_batch=1,
    )
    for moved in (False, True):
        known = tiny.trainer(given, model=tiny.llama(dtype=dtype, attention="segments"))
        if moved:  # as with train.start
            tiny.moved(known)
        of_pairs = [packs()[0], packs()[3]]
        rows = reference.measured(known, tiny.ListStore(of_pairs), "segments")
        data = [replace(pack, reference=row) for pack, row in zip(of_pairs, rows, strict=True)]
        result = next(tiny.steps(known, tiny.ListStore(data), count=3))
        assert result.loss == torch.tensor(math.log(2)).item()
        assert result.means["pairs/margin"] == 0.0


@pytest.mark.parametrize("chosen", [0.0, 0.3])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_a_step_has_the_loss_and_the_gradient_of_the_formula(micro: int, chosen: float) -> None:
    known = trainer(train__micro_batch=micro, train__chosen=chosen)
    data = store(known)
    references = [loss for index in range(len(data)) for loss in data[index].reference]
    tiny.moved(known)
    wanted = expected(known.loss.model, known.config.train, references)
    wanted.backward()
    gradient = known.flat.grad.clone()
    seen = tiny.gradients(known)
    result = next(tiny.steps(known, data, count=3))
    assert result.loss == pytest.approx(float(wanted.detach()), rel=1e-6)
    assert float((seen[0] - gradient).norm() / gradient.norm()) < 1e-5


@pytest.mark.parametrize("method", ["lora", "olora"])
def test_before_the_first_step_a_pair_is_compared_with_its_two_answers(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = trainer(train__chosen=0.3, adapter__method=method)
    pack = store(known)[3]
    rest = (known.config.train, "segments", tiny.CPU)
    check_pair(known.loss, known.adapted, pack, *rest)
    assert not known.flat.grad.any()
    other = replace(pack, reference=(pack.reference[0] + 1.5, *pack.reference[1:]))
    with refused("train.objective: before the first step a pair has a margin of 1.5 nats"):
        check_pair(known.loss, known.adapted, other, *rest)
    right = pairs.numbers
    monkeypatch.setattr(pairs, "numbers", lambda *given: right(*given[:3], 0.2, given[4]))
    with refused("train.objective: with attention segments, the gradient of a preference pair"):
        check_pair(known.loss, known.adapted, pack, *rest)


def test_the_automatic_rate_moves_the_margins_of_pairs_by_half_a_beta_at_most() -> None:
    found = []
    for beta in (0.1, 10.0, 40.0):
        known = trainer(train__beta=beta, train__global_batch=1)
        alike = [store(known)[0]] * 2
        start = known.flat.vector.clone()
        rate = known.automatic_rate(alike, 20, "segments")
        assert torch.equal(known.flat.vector, start)
        assert not known.flat.grad.any()
        trial = trainer(train__beta=beta, train__global_batch=1, train__lr=rate)
        next(tiny.steps(trial, tiny.ListStore(alike), count=3))
        after = held_out(trial.loss, tiny.ListStore(alike), trial.objective, "segments", width=2)
        found.append((rate, beta * after.means["pairs/margin"]))
    (free, moved), *limited = found
    assert moved < 0.4
    for rate, gain in limited:
        assert rate < free
        assert gain == pytest.approx(0.5, rel=0.1)


def test_held_out_pairs_give_one_line_each_and_their_means() -> None:
    known = trainer()
    data = store(known)
    tiny.moved(known)
    found = held_out(known.loss, data, known.objective, "segments", width=2, each=True)
    whole = held_out(known.loss, data, known.objective, "segments", width=2)
    assert len(found.losses()) == 6
    assert found.means == pytest.approx(whole.means, rel=1e-5)
    assert set(found.means) >= {"objective", "loss", "pairs/preferred", "pairs/margin"}


def test_ratings_move_both_sides_alike_and_leave_the_loss_of_right_answers() -> None:
    known = trainer(train__micro_batch=2)
    roles = [(UP, DOWN, UP), (UP, DOWN), (0, UP)]
    plain = [tiny.pack(9, 7, 8, seed=1), tiny.pack(12, 6, seed=2), tiny.pack(5, 11, seed=3)]
    rated = [replace(pack, roles=role) for pack, role in zip(plain, roles, strict=True)]
    rows = reference.measured(known, tiny.ListStore(rated), "segments")
    data = [replace(pack, reference=row) for pack, row in zip(rated, rows, strict=True)]
    tiny.moved(known)
    losses = torch.stack(
        [oracle.losses(known.loss.model, [each]).double().sum() for each in tiny.unpacked(data)]
    )
    gains = torch.tensor([each for pack in data for each in pack.reference]).double() - losses
    beta = known.config.train.beta
    flat = torch.tensor([role for row in roles for role in row])
    ups, downs = torch.sigmoid(-beta * gains[flat == UP]), torch.sigmoid(beta * gains[flat == DOWN])
    answer = tiny.unpacked(data)[5]
    mean = losses[5] / answer.supervised.sum()
    wanted = (mean + 6 * (ups.mean() + downs.mean()) / 2) / 7
    wanted.backward()
    gradient = known.flat.grad.clone()
    found = held_out(known.loss, data, known.objective, "segments", width=3)
    assert found.loss == pytest.approx(float(wanted.detach()), rel=1e-6)
    right = losses[flat != DOWN].sum() / found.whole.right
    assert found.means["loss"] == pytest.approx(float(right.detach()), rel=1e-6)
    assert found.means["ratings/down"] == pytest.approx(
        float(gains[flat == DOWN].mean().detach()), rel=1e-5
    )
    known.flat.grad.zero_()
    batch = collate(data, "segments")
    (known.objective.loss(known.loss, batch, found.whole)[0] / 7).backward()
    assert float((known.flat.grad - gradient).norm() / gradient.norm()) < 1e-5


def test_rejected_answers_calibrate_no_method() -> None:
    known = tiny.ListStore(packs())
    pieces = first_tokens(known, 1000)
    rights = [right_answers(collate([pack], "segments")) for pack in packs()]
    assert [piece.count for piece in pieces] == [6, 9 + 5, 3, 7 + 2]
    assert [len(each) for each in rights] == [6, 9 + 5, 3, 7 + 2]
    first, second = rights[1].tolist()[8:10]
    assert (first, second) == (10, 14)  # from the last token of the chosen answer to the next pair
