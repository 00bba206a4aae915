from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from olora_ray.common.errors import UserError
from olora_ray.config.dotted import flatten
from olora_ray.config.load import build, load, override
from olora_ray.sweep import load_space
from olora_ray.sweep.space import Space
from tests import tiny

ROOT = Path(__file__).parents[2]
SPACES = sorted((ROOT / "tune_spaces").glob("*.yaml"))
CONFIG = load(ROOT / "pipelines" / "configs" / "quickstart.yaml")


def space(tmp_path: Path, **tree: Any) -> Space:
    file = tmp_path / "space.yaml"
    file.write_text(yaml.safe_dump(tree))
    return load_space.load(file, CONFIG)


def test_every_shipped_space_fits_the_config() -> None:
    assert {path.stem for path in SPACES} >= {"smoke", "rank_alpha_lr", "lr_only", "population"}
    for path in SPACES:
        found = load_space.load(path, CONFIG)
        for number in range(found.count()):
            override(CONFIG, {**found.set, **found.values(found.drawn(number))})


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "typo in the config": (
        {"search": {"adapter.rnk": {"choice": [8]}}},
        "search.adapter.rnk: adapter.rnk: unknown field; did you mean adapter.rank?",
    ),
    "typo in the space": (
        {"search": {"adapter.rank": {"choise": [8]}}},
        "search.adapter.rank.choise: unknown field; did you mean search.adapter.rank.choice?",
    ),
    "invalid value": (
        {"search": {"adapter.rank": {"choice": [8, 0]}}},
        "search.adapter.rank: adapter.rank: input should be greater than or equal to 1 (got 0)",
    ),
    "empty range": (
        {"search": {"train.lr": {"uniform": [1e-3, 1e-4]}}},
        "search.train.lr: uniform [0.001, 0.0001] is an empty range",
    ),
    "empty choice": ({"search": {"adapter.rank": {"choice": []}}}, "search.adapter.rank.choice: "),
    "nothing searched": ({"search": {}}, "search: "),
    "logarithm of zero": ({"search": {"train.lr": {"loguniform": [0, 1]}}}, "loguniform needs numbers greater than 0"),
    "step too large": ({"search": {"adapter.rank": {"quniform": [8, 16, 20]}}}, "the step must be positive and fit"),
    "two kinds": ({"search": {"train.lr": {"choice": [1], "uniform": [1, 2]}}}, "needs exactly one of choice, grid"),
    "a field that decides nothing": ({"search": {"run.seed": {"choice": [1]}}}, "a search cannot vary run.*"),
    "depends on nothing": (
        {"search": {"adapter.alpha": {"of": "adapter.rank"}}},
        "search.adapter.alpha: of: adapter.rank is not searched by itself",
    ),
    "factor too small": (
        {"search": {"adapter.rank": {"choice": [8]}, "adapter.alpha": {"of": "adapter.rank", "times": [1, 0]}}},
        "search.adapter.alpha: adapter.alpha: input should be greater than 0",
    ),
    "metric that nobody reports": (
        {"search": {"train.lr": {"choice": [1e-3]}}, "metric": "eval/los"},
        "metric: 'eval/los' is never reported; use eval/loss, eval/perplexity, train/loss or score/NAME",
    ),
    "score with a scheduler": (
        {"search": {"train.lr": {"choice": [1e-3]}}, "metric": "score/exact_match"},
        "score/exact_match is measured once, at the end: use scheduler.kind: none",
    ),
    "grid over a range": (
        {"search": {"train.lr": {"uniform": [1e-4, 1e-3]}}, "searcher": "grid"},
        "a grid search needs choice or grid",
    ),
    "population over rank": (
        {"search": {"adapter.rank": {"choice": [8, 16]}}, "scheduler": {"kind": "population"}},
        "a population shares everything but train.*",
    ),
    "shared base and another model": (
        {"search": {"data.max_length": {"choice": [64, 128]}}, "trials_per_worker": 2},
        "with trials_per_worker all trials share one base and its data",
    ),
    "set of an unknown field": (
        {"search": {"train.lr": {"choice": [1e-3]}}, "set": {"train.stps": 3}},
        "set: train.stps",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_spaces_name_the_field(case: str, tmp_path: Path) -> None:
    tree, message = BAD[case]
    with pytest.raises(UserError) as error:
        space(tmp_path, **tree)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{tmp_path}/space.yaml: ")


def test_held_out_metrics_need_held_out_rows(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(yaml.safe_dump({"search": {"train.lr": {"choice": [1e-3]}}}))
    with pytest.raises(UserError, match=r"metric: eval/loss needs held-out rows: set data\.eval"):
        load_space.load(file, tiny.config())


def test_a_grid_has_every_combination_once_after_the_default(tmp_path: Path) -> None:
    found = space(
        tmp_path,
        search={"adapter.rank": {"choice": [4, 8]}, "adapter.alpha": {"of": "adapter.rank", "times": [1, 2, 4]}},
        searcher="grid",
    )
    assert found.count() == 7
    assert found.drawn(0) == {}
    assert found.values({}) == {}
    values = [found.values(found.drawn(number)) for number in range(1, 7)]
    assert {(v["adapter.rank"], v["adapter.alpha"]) for v in values} == {(r, r * f) for r in (4, 8) for f in (1, 2, 4)}


def test_a_grid_within_a_random_search_comes_round_evenly(tmp_path: Path) -> None:
    found = space(
        tmp_path,
        search={"adapter.rank": {"grid": [4, 8, 16]}, "train.lr": {"loguniform": [1e-4, 1e-3]}},
        trials=13,
    )
    ranks = Counter(found.drawn(number)["adapter.rank"] for number in range(1, 13))
    assert ranks == {4: 4, 8: 4, 16: 4}


@given(seed=st.integers(0, 2**31 - 1), number=st.integers(1, 500))
def test_draws_repeat_lie_inside_and_depend_on_the_number(seed: int, number: int) -> None:
    tree = {
        "search": {
            "train.lr": {"loguniform": [1e-5, 1e-2]},
            "adapter.rank": {"quniform": [4, 64, 4]},
            "adapter.alpha": {"of": "adapter.rank", "times": [0.5, 2]},
            "adapter.dropout": {"uniform": [0.0, 0.2]},
        },
        "seed": seed,
    }
    found = Space.model_validate(tree)
    draws = found.drawn(number)
    assert draws == Space.model_validate(tree).drawn(number)
    assert draws != found.drawn(number + 1)
    values = found.values(draws)
    assert list(values) == list(found.search)
    assert 1e-5 <= values["train.lr"] <= 1e-2
    assert values["adapter.rank"] in range(4, 65, 4)
    assert isinstance(values["adapter.rank"], int)
    assert values["adapter.alpha"] in (values["adapter.rank"] * 0.5, values["adapter.rank"] * 2)
    assert 0 <= values["adapter.dropout"] <= 0.2
    # What a config holds is found again as draws.
    config = override(build(CONFIG.model_dump(mode="json")), values)
    assert found.as_draws(config) == draws
    assert {field: flatten(config)[field] for field in values} == values
