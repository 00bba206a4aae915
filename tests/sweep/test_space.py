import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from olora_ray.common.errors import UserError
from olora_ray.config.load import build, flatten, load_config, override
from olora_ray.sweep import outcome, search_folder, space_file
from olora_ray.sweep.space import Space, Suggested
from tests import example_objective, tiny
from tests.refused import refused

ROOT = Path(__file__).parents[2]
SPACES = sorted((ROOT / "tune_spaces").glob("*.yaml"))
CONFIG = load_config(ROOT / "pipelines" / "configs" / "quickstart.yaml")


def space(tmp_path: Path, **tree: Any) -> Space:
    file = tmp_path / "space.yaml"
    file.write_text(yaml.safe_dump(tree))
    return space_file.load_space(file, CONFIG)


GATED = override(
    CONFIG,
    {
        "evaluation.scorer": "json_fields",
        "gate.and": [{"metric": "eval/valid_json", "at_least": 0.9}],
        "run.storage": "/nowhere",
    },
)


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_every_shipped_space_fits_a_config_whose_gate_asks_for_a_score(path: Path) -> None:
    """A search has no gate, and some spaces answer no rows. The best config has its gate again."""
    found = space_file.load_space(path, GATED)
    for number in range(found.count()):
        override(GATED, {**found.set, **found.values(found.drawn(number)), "gate.and": []})
    search = search_folder.search_config(GATED, found, path, registers=False)
    spec: Any = SimpleNamespace(space=found, name="search")
    trial: Any = SimpleNamespace(
        params=found.values(found.drawn(0)) if found.searcher != "tpe" else {}
    )
    for refit in (False, True):
        best = outcome.best_config(GATED, spec, trial, refit)
        assert (best.gate, best.evaluation) == (GATED.gate, GATED.evaluation)
    assert search.evaluation.scorer == found.set.get("evaluation.scorer", "json_fields")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "typo in the config": (
        {"search": {"adapter.rnk": {"choice": [8]}}},
        "search: adapter.rnk: unknown field; did you mean adapter.rank?",
    ),
    "empty range": (
        {"search": {"train.lr": {"uniform": [1e-3, 1e-4]}}},
        "search.train.lr: uniform [0.001, 0.0001] is an empty range",
    ),
    "a list": ({"search": {"adapter.rank": [8, 16]}}, "{choice: [8, 16]}"),
    "depends on nothing": (
        {"search": {"adapter.alpha": {"of": "adapter.rank"}}},
        "search.adapter.alpha: of: adapter.rank must be searched",
    ),
    "metric that nobody reports": (
        {"search": {"train.lr": {"choice": [1e-3]}}, "metric": "eval/los"},
        "'eval/los'; use eval/loss, eval/perplexity, train/loss or score/NAME",
    ),
    "score with a scheduler": (
        {"search": {"train.lr": {"choice": [1e-3]}}, "metric": "score/exact_match"},
        "metric: score/exact_match is measured once, at the end; set scheduler.kind: none",
    ),
    "grid over a range": (
        {"search": {"train.lr": {"uniform": [1e-4, 1e-3]}}, "searcher": "grid"},
        "search.train.lr: searcher: grid needs listed values",
    ),
    "shared base and another model": (
        {"search": {"data.max_length": {"choice": [64, 128]}}, "trials_per_worker": 2},
        "search.data.max_length: trials_per_worker > 1",
    ),
}


LR = {"train.lr": {"choice": [1e-3]}}
HALVES = {"adapter.method": {"choice": ["lora", "orthogonal"]}}


@pytest.mark.parametrize("searcher", ["random", "tpe"])
@pytest.mark.parametrize(
    "ranks",
    [
        {"adapter.rank": {"choice": [8, 7]}},
        {"adapter.rank": {"quniform": [8, 64, 3]}},
        {
            "adapter.alpha": {"choice": [4, 16]},
            "adapter.rank": {"of": "adapter.alpha", "times": [1, 0.25]},
        },
    ],
)
def test_a_method_and_a_rank_that_do_not_go_together_are_found_before_a_trial_has_both(
    ranks: dict[str, Any], searcher: str, tmp_path: Path
) -> None:
    with refused("search: adapter: rank"):
        space(tmp_path, search=HALVES | ranks, searcher=searcher)
    only = {"adapter.method": {"choice": ["lora", "pissa"]}}
    assert space(tmp_path, search=only | ranks, searcher=searcher, trials=1).count() == 1


def of(domain: Any, field: str = "train.lr") -> dict[str, Any]:
    return {"search": {field: domain}}


ODD: dict[str, tuple[dict[str, Any], str]] = {
    "a number as a text": (
        of({"choice": ["8", "32"]}, "adapter.rank"),
        "search.adapter.rank: '32' is text; write 32 without quotes",
    ),
    "twice": (
        of({"choice": [8, 16, 8]}, "adapter.rank"),
        "search.adapter.rank: choice has 8 twice",
    ),
    "step of 0": (
        of({"quniform": [1, 8, 0]}),
        "quniform [1.0, 8.0, 0.0]: the step must be positive",
    ),
    "fractions for a whole number": (
        of({"uniform": [1, 16]}, "train.micro_batch"),
        "search: train.micro_batch: input should be 'auto' or a valid integer, got a number with a"
        " fractional part (got 13.68); use quniform with whole numbers, or choice",
    ),
    # A field that depends on another.
    "a chain": (
        {
            "search": {
                **LR,
                "train.clip": {"of": "train.lr"},
                "train.weight_decay": {"of": "train.clip"},
            }
        },
        "search.train.weight_decay: of: train.clip must be searched",
    ),
    "a base that may be null": (
        {
            "search": {
                "train.clip": {"choice": [None, 1.0]},
                "train.weight_decay": {"of": "train.clip"},
            }
        },
        "search.train.weight_decay: of: train.clip has values that are not numbers",
    ),
    # Fields that must not vary, or not twice.
    "a place that must not vary": (
        of({"choice": ["x"]}, "tracking.uri"),
        "search.tracking.uri: set it in the config",
    ),
    "held-out rows": (
        of({"choice": [0.1, 0.2]}, "data.eval_fraction"),
        "search.data.eval_fraction: all trials must be measured in the same way",
    ),
    "a field and its section": (
        {"search": {**LR, "train": {"choice": [{"lr": 1}]}}},
        "search.train.lr: search.train sets it too; leave one out",
    ),
    "a section set for all": (
        {"search": LR, "set": {"data": {"max_length": 64}}},
        "set.data: a section would reset its other fields to their defaults; name single fields, data.NAME",
    ),
    "searched and set": (
        {"search": LR, "set": {"train.lr": 1e-4}},
        "set.train.lr: search.train.lr sets it too; leave one out",
    ),
    # The search as a whole.
    "a grid without end": (
        {
            "search": {
                f"train.{x}": {"grid": [i / 100 for i in range(1, 100)]}
                for x in ("lr", "clip", "warmup")
            }
        }
        | {"searcher": "grid"},
        "search: the grid has 970,300 combinations, including the unchanged config, more than 10,000",
    ),
    "a grid and fewer trials": (
        {"search": {"train.lr": {"grid": [1, 2, 3]}}, "searcher": "grid", "trials": 3},
        "trials: 3, but the grid has 4 combinations, including the unchanged config; leave it out",
    ),
    "the worst loss": ({"search": LR, "mode": "max"}, "mode: max searches for the worst eval/loss"),
    "a setting of another scheduler": (
        {"search": LR, "scheduler": {"kind": "none", "reduction": 4}},
        "scheduler: reduction: not used by kind: none; leave it out",
    ),
}
BAD |= ODD


def test_trials_are_measured_by_one_objective_that_has_the_metric(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with example_objective.installed(monkeypatch, tmp_path):
        other = {"train.objective": "examples"}
        with pytest.raises(UserError) as error:
            space(tmp_path, search=LR, set=other, metric="eval/perplexity")
        assert "metric: train.objective=examples" in str(error.value)
        both = {"train.objective": {"choice": ["tokens", "examples"]}}
        with pytest.raises(UserError) as error:
            space(tmp_path, search=both)
        assert "search.train.objective" in str(error.value)


def test_trials_with_pairs_are_ranked_by_what_they_train_on(tmp_path: Path) -> None:
    pairs = {"train.objective": "pairs"}
    found = space(tmp_path, search=LR, set=pairs)
    assert (found.metric, found.better(), found.paired()) == ("eval/objective", "min", False)
    beta = {"train.beta": {"choice": [0.05, 0.2]}}
    with refused("search.train.beta: it changes the scale of eval/objective"):
        space(tmp_path, search=beta, set=pairs)
    found = space(tmp_path, search=beta, set=pairs, metric="eval/pairs/preferred")
    assert found.better() == "max"
    assert space(tmp_path, search=LR).metric == "eval/loss"


@pytest.mark.parametrize("case", BAD)
def test_bad_spaces_name_the_field(case: str, tmp_path: Path) -> None:
    tree, message = BAD[case]
    with pytest.raises(UserError) as error:
        space(tmp_path, **tree)
    assert message in str(error.value)
    assert str(error.value).startswith(
        (f"{tmp_path}/space.yaml: ", f"{tmp_path}/space.yaml, line ")
    )
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("domain", "field", "value", "contains"),
    [
        ({"choice": [None, 1.0]}, "train.clip", None, True),  # null is a value like any other
        ({"quniform": [4, 64, 4]}, "adapter.rank", 12, True),
        (
            {"quniform": [4, 64, 4]},
            "adapter.rank",
            13,
            False,
        ),  # Optuna would silently use another value
        ({"quniform": [1, 16, 4]}, "adapter.rank", 16, False),
        ({"uniform": [1e-4, 1e-3]}, "train.lr", 2e-3, False),
    ],
)
def test_the_config_is_in_the_space_only_where_a_trial_could_have_its_values(
    domain: dict[str, Any], field: str, value: Any, contains: bool, tmp_path: Path
) -> None:
    found = space(tmp_path, search={field: domain})
    assert found.as_draws(override(CONFIG, {field: value})) == (
        {field: value} if contains else None
    )


SOURCE = {"path": "pipelines/quickstart/train.jsonl", "format": "messages"}


@pytest.mark.parametrize(
    ("field", "options", "own"),
    [
        ("data.train", [[{"path": "other.jsonl"}], [SOURCE]], [SOURCE]),
        ("data.train", [[{"path": "other.jsonl"}], [{**SOURCE, "weight": 2.0}]], None),
        (
            "data.train.0",
            [{"path": "other.jsonl"}, {**SOURCE, "weight": 1.0}],
            {**SOURCE, "weight": 1.0},
        ),
    ],
)
def test_a_list_of_the_config_is_found_among_the_options(
    field: str, options: list[Any], own: Any, tmp_path: Path
) -> None:
    """Its entries contain their defaults in a config, but not necessarily in a space."""
    for searcher in ("random", "tpe"):
        found = space(tmp_path, search={field: {"choice": options}}, searcher=searcher)
        assert found.as_draws(CONFIG) == (None if own is None else {field: own})


def test_values_that_optuna_draws_are_the_steps_themselves() -> None:
    import optuna

    search = {
        "train.warmup": {"quniform": [0.1, 0.5, 0.1]},
        "adapter.rank": {"quniform": [4, 63, 4]},
        "adapter.targets": {"choice": [["q_proj"], ["q_proj", "v_proj"], "all-linear"]},
        "train.clip": {"choice": [None, 1.0]},
    }
    found = Space.model_validate({"search": search, "searcher": "tpe"})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings(
            "ignore", message="Choices for a categorical"
        )  # tuner.py ignores it too
        for _ in range(30):
            trial = study.ask()
            found.draw(Suggested(trial))
            values = found.values(trial.params)
            assert values["train.warmup"] in (0.1, 0.2, 0.3, 0.4, 0.5)
            assert values["adapter.rank"] in range(4, 64, 4)
            assert isinstance(values["adapter.rank"], int)
            override(CONFIG, values)


def test_held_out_metrics_need_held_out_rows(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(yaml.safe_dump({"search": {"train.lr": {"choice": [1e-3]}}}))
    with refused("metric"):
        space_file.load_space(file, tiny.config())


def test_a_grid_has_every_combination_once_after_the_default(tmp_path: Path) -> None:
    found = space(
        tmp_path,
        search={
            "adapter.rank": {"choice": [4, 8]},
            "adapter.alpha": {"of": "adapter.rank", "times": [1, 2, 4]},
        },
        searcher="grid",
    )
    assert found.count() == 7
    assert found.in_words() == "7 trials, of which trial 0 is the unchanged config"
    assert found.drawn(0) == {}
    assert found.values({}) == {}
    values = [found.values(found.drawn(number)) for number in range(1, 7)]
    assert {(v["adapter.rank"], v["adapter.alpha"]) for v in values} == {
        (r, r * f) for r in (4, 8) for f in (1, 2, 4)
    }


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
    # The values of a config are draws of the space.
    config = override(build(CONFIG.model_dump(mode="json")), values)
    assert found.as_draws(config) == draws
    assert {field: flatten(config)[field] for field in values} == values
