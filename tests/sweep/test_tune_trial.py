"""A process of Tune runs one trial after another."""

import contextlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.experiment import Experiment
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter
from ray.tune.search.search_generator import SearchGenerator

from olora_ray.cluster.resources import Nodes
from olora_ray.cluster.spec import TrainSpec
from olora_ray.model.source import BaseModel
from olora_ray.sweep import run as search_run
from olora_ray.sweep import trial as trials
from olora_ray.sweep import tuner
from olora_ray.sweep.record import TrialFile, TrialRecord, read_all, read_record
from olora_ray.sweep.space import Space
from olora_ray.sweep.spec import NUMBER, PAIRED, SweepSpec, trial_name, trial_path
from olora_ray.sweep.trial import Ended, TrialLosses, TrialRun
from olora_ray.sweep.tuner import SearchTrial, SweepCallback
from tests import tiny
from tests.refused import refused
from tests.said import said


def spec(folder: Path, **changes: Any) -> SweepSpec:
    config = tiny.config(run__storage=str(folder), train__steps=2)
    store: Any = tiny.store()
    search = {"train.lr": {"loguniform": [1e-4, 1e-2]}}
    space = Space.model_validate(
        {"search": search, "metric": "train/loss", "trials": 3, "include_default": False, **changes}
    )
    train_spec = TrainSpec(
        config, BaseModel("tiny", str(folder), "digest"), "digest", (0,), store, None
    )
    return SweepSpec("search", str(folder / "search"), train_spec, space, "", 0.0)


def record_of(search: SweepSpec, number: int = 1, **changes: Any) -> TrialFile:
    """Return the trial.json of a trial with this rate."""
    return TrialFile(
        trial_path(search.folder, number),
        TrialRecord(number, {"train.lr": 1e-3}, "unfinished", **changes),
        "min",
    )


def process(search: SweepSpec, number: int) -> Any:
    """Return the process in which Tune runs a trial."""
    trial: Any = SearchTrial.__new__(SearchTrial)
    trial._trial_info = SimpleNamespace(trial_name=trial_name(number))
    trial.setup({NUMBER: number, "train.lr": 1e-3}, sweep_spec=search)
    return trial


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replaces trainings: a finished one has `result`, another one measures `losses` at their steps."""
    ended = SimpleNamespace(state=SimpleNamespace(history=[]))
    fake = SimpleNamespace(
        ended=ended, result=ended, losses={}, tracked=[], rows={}, metric="train/loss"
    )

    def tracked(spec: TrainSpec, *_: object) -> Any:
        fake.tracked.append(spec)
        return contextlib.nullcontext(SimpleNamespace(run_id="run", metrics=fake.rows.update))

    def train(*arguments: Any) -> Any:
        for step, loss in fake.losses.items():
            arguments[-2](step, {fake.metric: loss})
        return ended

    monkeypatch.setattr(trials.publish, "tracked", tracked)
    monkeypatch.setattr(trials.fit, "finished_training", lambda *_: fake.result)
    monkeypatch.setattr(trials.fit, "train", train)
    return fake


def test_a_trial_reports_the_training_losses_by_which_it_is_compared(
    tmp_path: Path, training: Any
) -> None:
    """At a sixteenth and a quarter of the steps: the mean over the second half of the steps so far."""
    training.result, training.losses = None, {step: 1 / step for step in range(1, 65)}
    search = spec(tmp_path, metric="eval/loss")
    search = replace(
        search, train_spec=replace(search.train_spec, config=tiny.config(train__steps=64))
    )
    trial = process(search, 1)
    first, second = trial.step(), trial.step()
    assert [(found["step"], found[PAIRED]) for found in (first, second)] == [
        (4, pytest.approx((1 / 3 + 1 / 4) / 2)),
        (16, pytest.approx(sum(1 / step for step in range(9, 17)) / 8)),
    ]
    assert trial.step()["ended"]
    record = read_all(str(tmp_path / "search"))[1]
    assert [step for step, _ in record.compared] == [4, 16]
    assert (record.step, record.value, record.curve) == (16, None, ())


def test_a_trial_whose_rows_come_late_has_the_whole_curve(tmp_path: Path, training: Any) -> None:
    """Regression: on a busy machine step 0 came after step 1, or only with the checkpoint's history, and was lost."""
    training.result, training.metric = None, "eval/loss"
    curve = {step: 1 - step / 10 for step in range(5)}
    training.losses = {step: curve[step] for step in (1, 0, 4, 2)}
    training.ended.state.history = [{"step": step, "eval/loss": curve[step]} for step in curve]
    search = spec(tmp_path, metric="eval/loss")
    run = TrialRun(search, 1, {"train.lr": 1e-3})
    told = [run.next(), run.next(), run.next()]
    assert told == [TrialLosses(1, curve[1]), TrialLosses(4, curve[4]), Ended("finished")]
    record = read_all(search.folder)[1]
    assert (record.curve, record.step) == (tuple(curve.items()), 4)
    assert training.rows == {step: {"eval/loss": loss} for step, loss in curve.items()}


@pytest.mark.parametrize("fails", [True, False])
def test_the_end_of_a_trial_arrives_whatever_the_storage_does(
    tmp_path: Path, training: Any, fails: bool
) -> None:
    """Regression: the thread died while writing its last record, and the search waited for ever."""
    training.result, training.losses = None, {"a bug" if fails else 2: 0.5}
    run = TrialRun(spec(tmp_path), 1, {"train.lr": 1e-3})
    Path(run.folder.root, "trial.json").mkdir(
        parents=True
    )  # a folder in place of the file cannot be written
    if fails:
        found = run.next()
        assert isinstance(found, Ended)
        assert (found.status, found.reason.partition(":")[0]) == ("failed", "TypeError")
    else:
        assert [run.next(), run.next()] == [TrialLosses(2, 0.5), Ended("finished")]


@pytest.mark.parametrize(
    ("present", "most", "waits"), [(1, 8, True), (0, 2, True), (1, 1, False), (4, 8, False)]
)
def test_a_trial_waits_for_nodes_that_the_autoscaler_may_start(
    present: int, most: int, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: a search without nodes failed after its preparation, which had brought only one node."""
    free = iter([1] * 10 + [2])
    monkeypatch.setattr(search_run, "free_workers", lambda wanted: next(free))
    monkeypatch.setattr(search_run.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(search_run.resources, "present", lambda: [Nodes({"CPU": 1.0}, present)])
    monkeypatch.setattr(search_run.resources, "maximum", lambda: [Nodes({"CPU": 1.0}, most)])
    asked: list[int] = []

    def request(wanted: object, count: int, after: float) -> Any:
        return contextlib.nullcontext(SimpleNamespace(look=lambda: asked.append(count)))

    monkeypatch.setattr(search_run, "PlacementRequest", request)
    with said() as lines:
        if waits:
            assert search_run._fitting({"CPU": 1.0}, 2) == 2
        else:
            with refused("cluster.workers=2"):
                search_run._fitting({"CPU": 1.0}, 2)
    assert asked == ([2, 2] if waits else [])
    assert bool(lines) is waits


def test_no_key_of_the_driver_is_told_to_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: Tune passed keys as environment variables, which Ray shows and writes to the logs of its nodes."""
    from ray.tune.execution import class_cache

    monkeypatch.setattr(
        class_cache, "ENV_VARS_TO_PROPAGATE", class_cache.ENV_VARS_TO_PROPAGATE
    )  # monkeypatch restores it
    for name in (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SECURITY_TOKEN",
        "AWS_SESSION_TOKEN",
    ):
        monkeypatch.setenv(name, "c4n4ry")
    monkeypatch.setenv("RAY_CHDIR_TO_TRIAL_DIR", "1")
    search = spec(tmp_path)
    tuner.build(search, SweepCallback(search.folder, search.space), 1)
    told: Any = class_cache._ActorClassCache().get(SearchTrial)
    variables = told._default_options["runtime_env"]["env_vars"]
    assert "c4n4ry" not in variables.values()
    assert variables["RAY_CHDIR_TO_TRIAL_DIR"] == "1"  # Tune's own variable is passed on


def begun(search: SweepSpec, state: str | None, concurrent: int = 1) -> Any:
    """Return Tune's settings of an interrupted search that left this state."""
    tuner.build(search, SweepCallback(search.folder, search.space), concurrent)
    if state is not None:
        Path(search.folder, "tune", "experiment_state-2026-11-27_04-00-00.json").write_text(state)


def again(search: SweepSpec, concurrent: int = 1) -> Any:
    """Return the Tuner of the next attempt."""
    made: Any = tuner.build(search, SweepCallback(search.folder, search.space), concurrent)
    return made._local_tuner


def test_a_trial_that_goes_on_from_its_own_checkpoint_keeps_its_values(
    tmp_path: Path, training: Any
) -> None:
    """Tune has forgotten the trial and starts it as a new one, but its training resumes."""
    first = record_of(search := spec(tmp_path))
    for step, value in ((1, 0.5), (2, 0.6)):
        first.measured(step, value)
    Path(trial_path(search.folder, 1), "checkpoints", "step-0000001").mkdir(parents=True)
    training.result, training.losses = None, {2: 0.7}
    second = TrialRun(search, 1, {"train.lr": 1e-3})
    assert [second.next(), second.next()] == [TrialLosses(2, 0.7), Ended("finished")]
    found = read_all(search.folder)[1]
    assert (found.curve, found.value) == (((1, 0.5), (2, 0.7)), 0.5)


@pytest.mark.parametrize(("rate", "kept"), [(1e-3, True), (2e-3, False)])
def test_a_trial_does_not_go_on_from_a_checkpoint_of_other_values(
    tmp_path: Path, training: Any, rate: float, kept: bool
) -> None:
    """Regression: Optuna drew another rate after a kill, and the training silently resumed with the old one."""
    search = spec(tmp_path, searcher="tpe")
    first = TrialRun(search, 1, {"train.lr": 1e-3})
    first.folder.write_config(first.config, {}, first.folder.state())
    record_of(search).begin()
    (checkpoint := Path(first.folder.checkpoints, "step-0000001")).mkdir(parents=True)
    second = TrialRun(search, 1, {"train.lr": rate})
    assert second.next() == Ended("finished")
    assert checkpoint.exists() == kept
    assert second.folder.state().other_settings(second.config) == ""
    assert read_all(search.folder)[1].params == {"train.lr": rate}
    log = Path(second.folder.root, "log.txt")
    assert log.exists() != kept
    assert kept or "the trial restarts: train.lr was 0.001, is 0.002" in log.read_text()


@pytest.mark.parametrize("state", [None, '{"trial_data": [["{}", "', '{"trial_data": []}'])
@pytest.mark.parametrize("searcher", ["random", "tpe"])
def test_a_search_whose_state_is_lost_begins_anew(
    tmp_path: Path, searcher: str, state: str | None
) -> None:
    """Regression: Tune ran one trial of Optuna and called the search complete."""
    search = spec(tmp_path, searcher=searcher)
    begun(search, state)
    kept = Path(search.folder, "trials", "trial-000", "kept")
    kept.parent.mkdir(parents=True)
    kept.write_text("")
    with said() as lines:
        made = again(search)
    assert not made._is_restored
    assert made._tune_config.num_samples == (3 if searcher == "tpe" else 1)
    assert not list(Path(search.folder, "tune").glob("experiment_state-*"))
    assert lines == [
        "warning: search: Ray Tune's state is lost; the search starts again, its trials resume from checkpoints"
    ]
    assert kept.exists() == (searcher == "random")


def test_what_was_measured_is_not_given_to_other_values(tmp_path: Path) -> None:
    """Trials that start again have other draws, but their folders hold results of the old draws."""
    search = spec(tmp_path, searcher="tpe")
    begun(search, None)
    kept = record_of(search, 0)
    kept.measured(2, 0.5)
    with refused("Ray Tune cannot resume the search in"):
        again(search)
    assert read_record(trial_path(search.folder, 0)) == kept.record


def handed_on(first: Any, second: Any, folder: Path) -> None:
    """Restore one of Tune's searchers from the state of another one."""
    place = folder / "driver"
    place.mkdir()
    first.save_to_dir(str(place), "2026-11-27_04-00-00")
    second.restore_from_dir(str(place))


@pytest.mark.parametrize("searcher", ["random", "tpe"])
def test_trials_that_are_made_after_a_search_was_moved_write_where_it_lies_now(
    tmp_path: Path, searcher: str
) -> None:
    """Regression: each trial was trained and then counted as failed, because Tune wrote its note to the old folder.

    The concurrency is that of today, too, not that of the first attempt.
    """
    search = spec(tmp_path, searcher=searcher)
    begun(search, '{"trial_data": [["{}", "{}"]]}')
    found = again(search, concurrent=2)._tune_config.search_alg
    first: Any = BasicVariantGenerator(max_concurrent=5)
    limiter = found
    if searcher == "tpe":
        first = SearchGenerator(ConcurrencyLimiter(found.searcher.searcher, 5))
        limiter = found.searcher
    old = tmp_path / "old"
    first.add_configurations(
        [Experiment("tune", SearchTrial, config={NUMBER: 0}, storage_path=str(old), num_samples=2)]
    )
    assert first.next_trial().storage.storage_fs_path == str(old)
    handed_on(first, found, tmp_path)
    trial = found.next_trial()
    assert trial.storage.storage_fs_path == search.folder
    assert limiter.max_concurrent == 2
