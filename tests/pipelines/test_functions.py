"""What a user of Hugging Face's libraries types: rows in memory, keywords, functions. No Ray: what a call would train.

The training itself is in test_python.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
from datasets import ClassLabel, Dataset, Features, Value

import olora_ray
from olora_ray.calls import settings
from olora_ray.config.schema import Config
from tests.pipelines import project

ROWS = [{"prompt": f"after {number}?", "completion": str(number + 1)} for number in range(40)]
LABELS = Dataset.from_dict(
    {"prompt": [f"text {number}" for number in range(80)], "completion": [0, 1] * 40},
    Features({"prompt": Value("string"), "completion": ClassLabel(names=["bad", "good"])}),
)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(tiny_model)
    project.make_corpus(tmp_path / "train.jsonl", 40)


def asked(data: Any, eval: Any = None, **fields: Any) -> Config:
    """The config of a call."""
    named = {"model.name": "model", **settings.changes_of(fields)}
    return settings.config_of(None, named, {"data": data, "eval": eval})


def rows_of(config: Config, part: str = "train") -> list[Any]:
    (source,) = getattr(config.data, part)
    return [json.loads(line) for line in Path(source.path).read_text().splitlines()]


@pytest.mark.parametrize(
    "data",
    [
        ROWS,
        tuple(ROWS),
        pandas.DataFrame(ROWS),
        Dataset.from_list(ROWS),
        pytest.param(iter(ROWS), id="an iterator"),
    ],
    ids=lambda data: type(data).__name__,
)
def test_rows_in_memory_are_written_below_the_run(data: Any) -> None:
    config = asked(data, run={"name": "numbers"})
    assert rows_of(config) == ROWS
    assert Path(config.data.train[0].path).is_relative_to(config.folder())
    assert Path(config.folder()) == Path("runs/numbers").absolute()
    assert config.data.holds_out()


@pytest.mark.parametrize("data", ["train.jsonl", Path("train.jsonl"), [Path("train.jsonl")]])
def test_a_path_is_read_where_it_is(data: Any) -> None:
    assert asked(data).data.train[0].path == str(Path("train.jsonl").absolute())


def test_equal_rows_are_the_same_run_and_other_rows_or_settings_are_another() -> None:
    first = asked(ROWS)
    assert asked([*ROWS]) == first
    assert first.registry.model is None
    for other in (asked(ROWS[1:]), asked(ROWS, lr=1e-3)):
        assert other.run.name != first.run.name


def test_held_out_rows_are_given_or_drawn() -> None:
    given = asked(ROWS, eval=pandas.DataFrame(ROWS[:3]))
    assert rows_of(given, "eval") == ROWS[:3]
    assert given.data.eval_fraction is None
    assert asked(ROWS, eval_fraction=0.4).data.eval_fraction == 0.4


def test_rows_replace_those_of_a_config() -> None:
    tree = {"model": {"name": "model"}, "data": {"train": "train.jsonl", "eval_fraction": 0.5}}
    config = settings.config_of(tree, {"run.name": "numbers"}, {"data": ROWS, "eval": ROWS[:2]})
    assert (rows_of(config), rows_of(config, "eval")) == (ROWS, ROWS[:2])


def test_missing_values_are_null_and_labels_have_names() -> None:
    frame = pandas.DataFrame({**LABELS[:40], "note": [float("nan")] * 40})
    assert {row["note"] for row in rows_of(asked(frame))} == {None}
    config = asked(LABELS)
    assert config.data.train[0].labels == {"completion": ("bad", "good")}
    assert config.evaluation.scorer == "macro_f1"


def test_keywords_are_fields_by_their_own_or_hugging_faces_names() -> None:
    config = asked(
        ROWS, lr=1e-3, num_train_epochs=2, r=4, cluster={"workers": 1}, storage=Path("elsewhere")
    )
    assert (config.train.lr, config.train.epochs, config.adapter.rank) == (1e-3, 2, 4)
    assert config.cluster.workers == 1
    assert config.run.storage == str(Path("elsewhere").absolute())


def length(answer: str, reference: str) -> dict[str, float]:
    """Score an answer's length."""
    return {"length": min(1.0, len(answer) / len(reference))}


def test_a_function_is_a_scorer() -> None:
    from olora_ray.train.scoring import resolve

    assert resolve(str(asked(ROWS, scorer=length).evaluation.scorer)) is length


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: asked([]), "data"),
        (lambda: asked(["no dict", 1]), "data"),
        (lambda: asked([1]), "data"),
        (lambda: asked({"train": ROWS}), "data"),
        (lambda: asked(3), "data"),
        (lambda: asked([{"prompt": {1}}]), "data"),
        (lambda: asked(ROWS, eval=[]), "eval"),
        (lambda: asked(ROWS, per_device_train_batch_size=2), "per_device_train_batch_size"),
        (lambda: asked(ROWS, nonsense=2), "nonsense"),
        (lambda: asked(ROWS, scorer=lambda *_: {}), "evaluation.scorer"),
        (lambda: olora_ray.finetune(data=ROWS), "arguments"),
        (lambda: olora_ray.load("models:/nobody@champion"), "model.name"),
        (lambda: olora_ray.init("train.jsonl", nonsense=1), "argument --nonsense"),
        (lambda: olora_ray.sweep("none.yaml", "none.yaml", register=True), "config file none.yaml"),
        (lambda: olora_ray.compare("none.yaml", methods="lora,olora"), "config file none.yaml"),
        (lambda: olora_ray.retrain("none.yaml", {"train.steps": 2}), "config file none.yaml"),
    ],
)
def test_a_mistake_is_one_error_that_names_its_argument(
    call: Callable[[], object], field: str
) -> None:
    with pytest.raises(olora_ray.UserError) as error:
        call()
    assert str(error.value).startswith(field)
    assert not list(Path().glob("runs/*/rows"))


def test_init_returns_the_config_it_writes() -> None:
    written = olora_ray.init("train.jsonl", model="model", name="numbers", out="numbers.yaml")
    assert settings.config_of(written, {}, {}).run.name == "numbers"


def test_functions_stay_when_packages_of_their_name_are_imported() -> None:
    from olora_ray.retrain import gate
    from olora_ray.sweep import space

    assert gate.__name__ == "olora_ray.retrain.gate"
    assert space.__name__ == "olora_ray.sweep.space"
    assert callable(olora_ray.sweep)
    assert callable(olora_ray.retrain)
