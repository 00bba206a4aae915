"""What a comparison is asked for, and whose its folder is."""

from pathlib import Path

import pytest
import yaml

from olora_ray.common.errors import UserError
from olora_ray.config.load import override
from olora_ray.sweep.compare import arguments, settings
from olora_ray.sweep.compare.arguments import Comparison, read
from tests.sweep.compare import made


@pytest.fixture
def file(tmp_path: Path) -> str:
    tree = {
        "run": {"name": "task", "storage": str(tmp_path / "runs"), "seed": 17},
        "model": {"name": "some/model"},
        "data": {"train": [{"path": str(tmp_path / "rows.jsonl")}]},
        "adapter": {"dropout": 0.1},
        "train": {"early_stop": 3, "global_batch": 4},
        "cluster": {"workers": [1, 2]},
        "registry": {"model": "task"},
    }
    place = tmp_path / "config.yaml"
    place.write_text(yaml.safe_dump(tree))
    return str(place)


def test_a_comparison_has_a_name_of_its_own_and_the_same_rules_for_all(
    file: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    found = read([file, "train.lr=1e-4", "--methods", "lora, olora", "--seeds=3", "--budget", "1h30m"], "usage")
    assert (found.methods, found.seeds, found.budget) == (("lora", "olora"), (18, 19, 20), 5400.0)
    config = found.config
    assert (config.run.name, config.run.seed, config.train.lr) == ("task-compare", 17, 1e-4)
    assert (config.adapter.dropout, config.train.early_stop, config.registry.model) == (0.0, None, None)
    assert config.cluster.workers == 1
    assert "adapter.dropout: 0 in all trainings of a comparison, instead of 0.1" in caplog.text
    assert "train.early_stop: null in all trainings" in caplog.text
    assert "registry.model" not in caplog.text
    assert config.run.seed not in found.seeds


@pytest.mark.parametrize(("text", "seconds"), [("3h", 10800), ("90m", 5400), ("45s", 45), ("54", 54), ("1.5h", 5400)])
def test_budgets(file: str, text: str, seconds: float) -> None:
    assert read([file, "--budget", text], "usage").budget == seconds


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"arguments \(none\): expected a config file"),
        (["FILE", "FILE"], "expected a config file"),
        (["FILE", "--methods", "lora,pisa"], "argument --methods: 'pisa' is no adapter.method; there are "),
        (["FILE", "--methods", "olora"], "argument --methods: lora is missing, which the others are compared with"),
        (["FILE", "--methods", "lora"], "argument --methods: name at least one besides lora"),
        (["FILE", "--seeds", "1"], "argument --seeds: expected 2 to 100 seeds, not '1'"),
        (["FILE", "--seeds", "four"], "argument --seeds: expected 2 to 100 seeds"),
        (["FILE", "--budget", "soon"], "argument --budget: expected a time such as 3h, 90m or 1h30m, not 'soon'"),
        (["FILE", "--budget", "0h"], "argument --budget: expected a time"),
        (["FILE", "train.start=/x"], r"train\.start: a comparison is of ways to start"),
        (["FILE", "compare.centres={pisa: 1e-3}"], r"compare\.centres: 'pisa' is no adapter\.method"),
        (["FILE", "compare.test_rows=1"], r"compare\.test_rows: "),
    ],
)
def test_mistakes_are_one_line(file: str, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read([file if word == "FILE" else word for word in words], "usage")
    assert "\n" not in str(error.value)


def test_the_methods_are_those_of_the_config() -> None:
    assert {"lora", "olora"} <= set(arguments.known_methods())


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Comparison:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(settings.address, "find", lambda: "local")
    monkeypatch.setattr(settings.mlflow_run, "check_tracking", lambda config, folder: None)
    found = made.comparison(tmp_path)
    settings.begin(found, {"test rows": "a", "base model": "b"})
    (Path(found.config.folder()) / "tuning-1").mkdir()
    return found


def test_the_same_comparison_goes_on(begun: Comparison) -> None:
    settings.check(begun)
    settings.begin(begun, {"test rows": "a", "base model": "b"})
    settings.check(Comparison(begun.config, begun.methods, begun.seeds, budget=60.0))


@pytest.mark.parametrize(
    ("changes", "seeds", "methods", "message"),
    [
        ({"train.steps": 50}, 4, ("lora", "olora"), r"1 other setting \(train\.steps was 40, is 50\)"),
        ({"compare.relevant": 0.5}, 4, ("lora", "olora"), r"compare\.relevant was 0\.01, is 0\.5"),
        ({"compare.centres": {"olora": 1e-4}}, 4, ("lora", "olora"), r"compare\.centres was {}, is {'olora': 0\.0001}"),
        ({"gate.group": "user"}, 4, ("lora", "olora"), r"gate\.group was None, is 'user'"),
        ({}, 8, ("lora", "olora"), r"--seeds was 4, is 8"),
        ({}, 4, ("olora", "lora"), r"--methods was \['lora', 'olora'\], is"),
    ],
)
def test_what_is_compared_is_fixed_before_it_begins(
    begun: Comparison, changes: dict[str, object], seeds: int, methods: tuple[str, ...], message: str
) -> None:
    """More seeds once the result is known would be a search for one that pleases."""
    other = Comparison(override(begun.config, changes), methods, tuple(range(4, 4 + seeds)), None)
    with pytest.raises(UserError, match=message):
        settings.check(other)


def test_until_the_first_trial_settings_and_rows_may_change(begun: Comparison) -> None:
    """Refused for its budget, say."""
    folder = Path(begun.config.folder())
    (folder / "tuning-1").rmdir()
    (folder / "shared" / "lora").mkdir(parents=True)
    same = {"test rows": "a", "base model": "b"}
    settings.begin(begun, same)
    assert (folder / "shared" / "lora").exists()
    other = Comparison(override(begun.config, {"train.steps": 5}), begun.methods, begun.seeds, None)
    settings.check(other)
    settings.begin(other, {**same, "test rows": "other"})
    assert not (folder / "shared").exists()
    (folder / "tuning-1").mkdir()
    settings.check(other)
    with pytest.raises(UserError, match=r"train\.steps was 5, is 40"):
        settings.check(begun)


def test_other_rows_and_damage_are_refused(begun: Comparison) -> None:
    with pytest.raises(UserError, match="another test rows"):
        settings.begin(begun, {"test rows": "other", "base model": "b"})
    (Path(begun.config.folder()) / "compare.json").write_text("{")
    with pytest.raises(UserError, match=r"compare\.json: cannot be read; put it back, or delete "):
        settings.check(begun)


def test_few_seeds_are_said(begun: Comparison, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings.check(made.comparison(tmp_path, seeds=2, **{"run.name": "few"}))
    assert "--seeds 2: fewer than 4 say little" in caplog.text
