"""Held-out results are the same for any number of actors."""

import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from olora_ray.common.errors import UserError
from olora_ray.config.load import build, override
from olora_ray.config.schema import Config
from olora_ray.evaluation import held_out
from olora_ray.evaluation.held_out import measure
from olora_ray.evaluation.rows import RowResults
from olora_ray.pipeline.base import open_base
from olora_ray.tokens.prepare import prepare
from tests.pipelines.project import make_corpus, make_model, settings
from tests.said import said

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("project")
    make_corpus(folder / "train.jsonl", 4)
    make_corpus(folder / "eval.jsonl", 30, first=100)
    return build(settings(folder, make_model(folder / "model"), evaluation__rows=25))


def measured(config: Config) -> RowResults:
    base = open_base(config)
    return measure(base, None, prepare(config, base.spec, "eval"), config)


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_actors(ray_with: Callable[[int], None], config: Config) -> None:
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
    with pytest.raises(UserError, match=r"^piece 2: broken$"):
        held_out.map_over_actors(partial(Piece, 2), [1, 2, 3], config)
    assert held_out.map_over_actors(partial(Piece, 2), [5, 1, 3], config) == [5, 1, 3]
    assert "constructor arguments" not in capfd.readouterr().err  # of Ray's C++ log


@pytest.mark.slow
def test_rows_that_are_measured_in_several_precisions_are_told(
    ray_with: Callable[[int], None], config: Config, tmp_path: Path
) -> None:
    ray_with(2)
    both = override(config, {"cluster.workers": 2, "cluster.cpus_per_worker": 1})
    for model, warned in (("auto", 1), ("float32", 0)):
        with said() as lines:
            make = partial(Kind, tmp_path / model)
            assert held_out.map_over_actors(make, [0, 1, 2, 3], override(both, {"model.dtype": model})) == [0, 1, 2, 3]
        found = [
            line for line in lines if re.search("model.dtype=auto: .* bfloat16 .* float32, .* set model.dtype", line)
        ]
        assert len(found) == warned


class Kind:
    """Work for actors of which the first is on a processor that is fast at bfloat16; each actor has work to do."""

    def __init__(self, first: Path) -> None:
        try:
            first.mkdir()
            fast = True
        except FileExistsError:
            fast = False
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            setattr(torch.cpu, name, lambda: fast)

    def __call__(self, number: int) -> int:
        time.sleep(1)
        return number


class Piece:
    def __init__(self, broken: int) -> None:
        self.broken = broken

    def __call__(self, number: int) -> int:
        if number == self.broken:
            raise UserError(f"piece {number}: broken")
        return number
