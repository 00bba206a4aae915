"""Retraining, rollback and promotion at the same time, on a real MLflow: a gate replaces only what it compared with."""

import pytest

from olora_ray.tracking.aliases import Aliases
from tests import mlflow_database, registered
from tests.retrain.interleave import Game, Tally


@pytest.fixture(scope="module")
def aliases(tmp_path_factory: pytest.TempPathFactory) -> Aliases:
    """A model with six versions."""
    return registered.model(mlflow_database.place(tmp_path_factory.mktemp("drivers")), "m", 6)


def play(aliases: Aliases, seeds: range) -> Tally:
    tally = Tally()
    for seed in seeds:
        game = Game(aliases, seed, tally)
        game.reset()
        game.play()
    return tally


def check(tally: Tally) -> None:
    assert tally.stale == 0
    assert tally.against_hand == 0
    assert tally.inconsistent == []


def test_a_few_interleavings(aliases: Aliases) -> None:
    check(play(aliases, range(5)))


@pytest.mark.slow
def test_a_hundred_interleavings_of_retraining_rollback_and_promotion(aliases: Aliases) -> None:
    tally = play(aliases, range(100))
    check(tally)
    assert min(tally.promoted, tally.again, tally.by_hand, tally.rolled_back, tally.killed) >= 10, "all of it happened"
