"""Held-out results are the same for any number of actors."""

from collections.abc import Callable
from functools import partial

import pytest

from olora_ray.common.errors import UserError
from olora_ray.config.load import build, override
from olora_ray.config.schema import Config
from olora_ray.evaluation import held_out
from olora_ray.evaluation.held_out import measure
from olora_ray.evaluation.rows import RowResults
from olora_ray.pipeline.base import open_base
from olora_ray.tokens.prepare import prepare
from tests import tiny
from tests.pipelines.project import make_corpus, make_model, settings
from tests.refused import refused

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("project")
    make_corpus(folder / "train.jsonl", 4)
    make_corpus(folder / "eval.jsonl", 30, first=100)
    return build(settings(folder, make_model(folder / "model"), evaluation__rows=25))


def measured(config: Config) -> RowResults:
    base = open_base(config)
    known = tiny.decided(config)
    return measure(base, None, prepare(known, base.spec, "eval"), known)[0]


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_actors(
    ray_with: Callable[[int], None], config: Config
) -> None:
    ray_with(2)
    four = measured(override(config, {"cluster.workers": 4}))  # half a CPU each
    one = measured(override(config, {"cluster.workers": 1, "train.micro_batch": 4}))
    assert len(four.losses) == len(four.tokens) == 30
    assert len(four.scores["exact_match"]) == 25
    assert four.tokens == one.tokens
    assert four.scores == one.scores
    assert four.losses == pytest.approx(one.losses, rel=1e-5)


@pytest.mark.slow
def test_what_a_user_can_fix_comes_back_as_it_was_raised(
    ray_with: Callable[[int], None], config: Config, capfd: pytest.CaptureFixture[str]
) -> None:
    ray_with(2)
    known = tiny.decided(config)
    with refused("piece 2"):
        held_out.map_over_actors(partial(Piece, 2), [1, 2, 3], known)
    assert held_out.map_over_actors(partial(Piece, 2), [5, 1, 3], known) == [5, 1, 3]
    assert "constructor arguments" not in capfd.readouterr().err  # of Ray's C++ log


class Piece:
    def __init__(self, broken: int) -> None:
        self.broken = broken

    def __call__(self, number: int) -> int:
        if number == self.broken:
            raise UserError(f"piece {number}: broken")
        return number
