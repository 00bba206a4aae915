"""A comparison from its first trial to its page, with invented trainings that leave real files."""

import json
import math
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from comparison import analysis, folder, grid, report
from comparison.arguments import Compare, Comparison
from comparison.record import ComparisonRecord, Reached
from olora_ray.common.errors import UserError
from olora_ray.config.schema import Config
from tests.comparison import made
from tests.comparison.made import Cluster
from tests.said import said


def compared(monkeypatch: pytest.MonkeyPatch, found: Comparison, cluster: Cluster) -> ComparisonRecord:
    work = made.running(monkeypatch, found, cluster)
    tuning = work.tune()
    return analysis.record(work, tuning, work.train(tuning), "2 CPUs")


def test_each_method_is_tuned_and_then_compared_with_fresh_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, asked = Cluster(), made.comparison(tmp_path)
    record = compared(monkeypatch, asked, cluster)
    lora, olora = record.of("lora"), record.of("olora")
    assert lora.tuned is not None
    assert olora.tuned is not None
    assert (lora.tuned.cell.lr, olora.tuned.cell.lr) == (3.2e-3, 2e-4)
    assert lora.tuned.inside
    assert olora.tuned.inside
    final = [values for values in cluster.trained if values.get("run.seed")]
    assert len(final) == 8
    assert {values["run.seed"] for values in final} == {4, 5, 6, 7}  # the tuning had seed 3
    assert {(values["adapter.method"], values["train.lr"]) for values in final} == {("lora", 3.2e-3), ("olora", 2e-4)}
    tuning = [values for values in cluster.trained if "run.seed" not in values]
    assert len(tuning) == len({json.dumps(values) for values in tuning})
    place = Path(asked.config.folder())
    assert sorted(path.name for path in place.iterdir() if path.name != "shared") == [
        *("code.json", "final", "tuning-1", "tuning-2")
    ]


def test_the_difference_is_that_of_the_losses_with_its_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = compared(monkeypatch, made.comparison(tmp_path), Cluster())
    against = record.of("olora").against
    assert against is not None
    assert against.mean == pytest.approx(0.01, abs=1e-6)  # the luck of a seed is in both
    assert against.interval == against.adjusted  # one comparison
    assert against.interval.low < 0.01 < against.interval.high
    lora = record.of("lora")
    assert lora.loss is not None
    assert lora.loss == pytest.approx(sum(each.loss for each in lora.trainings) / 4)
    assert record.base_test == record.base_tuning == made.BASE


def test_the_rows_that_are_told_are_those_that_were_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(left=made.ROWS - 3)
    record = compared(monkeypatch, made.comparison(tmp_path), cluster)
    assert record.rows == {"train": 1000, "tuning": 57, "test": 57}
    assert record.groups == 57
    [said] = report.sentences(record)
    assert "4 seeds x 57 test rows" in said
    assert "57 other rows" in said
    assert "rows 1,000 train, 57 tuning, 57 test" in report.about(record)


@pytest.mark.parametrize("left", [0, 1])
def test_rows_of_one_group_are_too_few_before_anything_is_trained_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    work = made.running(monkeypatch, made.comparison(tmp_path), cluster := Cluster(left=left))
    tuning = work.tune()
    trained = len(cluster.trained)
    with pytest.raises(UserError, match=rf"compare\.test_rows: only {left} of the 60 test rows fit"):
        work.train(tuning)
    assert len(cluster.trained) == trained


def test_steps_to_the_baselines_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = compared(monkeypatch, made.comparison(tmp_path), Cluster())
    own, other = record.typical("lora"), record.typical("olora")
    assert own is not None
    assert other is not None
    assert own.reached
    assert own.steps == made.STEPS
    assert own.seconds == pytest.approx(0.8 + 0.5 * made.STEPS)
    assert own.tokens == pytest.approx(100 * made.STEPS)
    assert not other.reached  # it ends 0.01 above
    ratio = record.ratio("olora")
    assert ratio is not None
    assert ratio.shown() == "never (never .. never)"
    row = dict(zip(report.HEAD, report.cells(record, record.of("olora")), strict=True))
    assert row["steps to lora's loss"] == ">40"


def test_what_half_of_the_seeds_do_not_reach_is_not_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = compared(monkeypatch, made.comparison(tmp_path), Cluster())
    method = record.of("olora")
    for reached, steps in (((True, True, False, False), ">40"), ((True, True, True, False), "14")):
        each = [Reached(there, at, at, at) for there, at in zip(reached, (10.0, 12.0, 14.0, 40.0), strict=True)]
        each = [one if one.reached else replace(one, steps=40.0) for one in each]
        trainings = tuple(replace(one, reached=at) for one, at in zip(method.trainings, each, strict=True))
        other = replace(record, methods=(record.of("lora"), replace(method, trainings=trainings)))
        row = dict(zip(report.HEAD, report.cells(other, other.of("olora")), strict=True))
        assert row["steps to lora's loss"] == steps


@pytest.mark.lengthy
def test_trainings_of_several_versions_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, losses of one version were silently compared with those of another."""
    asked, cluster = made.comparison(tmp_path), Cluster(stop_after=5)
    with pytest.raises(KeyboardInterrupt):
        compared(monkeypatch, asked, cluster)
    cluster.stop_after = None
    monkeypatch.setattr(folder.node_cache, "code", lambda: "another")
    with said() as lines:
        record = compared(monkeypatch, asked, cluster)
    assert sum(folder.MIXED in line for line in lines) == 1
    assert record.notes == (folder.MIXED,)
    monkeypatch.setattr(folder.node_cache, "code", lambda: "a third")
    with said() as lines:  # there is nothing left to train
        compared(monkeypatch, asked, cluster)
    assert not any(folder.MIXED in line for line in lines)


@pytest.mark.lengthy
@pytest.mark.parametrize(("killed_at", "code", "notes"), [(5, "one", ()), (16, "two", (folder.MIXED,))])
def test_a_driver_that_is_killed_has_noted_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int, code: str, notes: tuple[str, ...]
) -> None:
    """A driver that was killed in a phase had noted no version, so the next version was not reported."""
    asked, cluster, codes = made.comparison(tmp_path), Cluster(stop_after=14), ["one"]
    monkeypatch.setattr(folder.node_cache, "code", lambda: codes[-1])
    if killed_at > 14:
        with pytest.raises(KeyboardInterrupt):
            compared(monkeypatch, asked, cluster)
    codes.append(code)
    cluster.stop_after, cluster.stop = killed_at, lambda: os.kill(os.getpid(), signal.SIGKILL)
    driver = multiprocessing.get_context("fork").Process(target=compared, args=(monkeypatch, asked, cluster))
    driver.start()
    driver.join()
    assert driver.exitcode == -signal.SIGKILL
    codes.append("one")
    assert compared(monkeypatch, asked, Cluster()).notes == notes


def test_trials_of_a_grid_that_began_elsewhere_are_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials are found by number, so the loss of one rate was once taken for another's."""
    asked, cluster = made.comparison(tmp_path), Cluster()
    made.running(monkeypatch, asked, cluster).tune()
    monkeypatch.setitem(grid.CENTRES, "olora", 1e-5)
    with pytest.raises(
        UserError, match=r"tuning-1: trial-\d+ has other values than .*; resume with that version, or choose"
    ):
        made.running(monkeypatch, asked, cluster).tune()


@pytest.mark.lengthy
def test_an_interrupted_comparison_trains_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Cluster()
    record = compared(monkeypatch, made.comparison(tmp_path / "a"), whole)
    ran = []
    for stop_after in range(1, len(whole.trained), 6):
        cluster = Cluster(stop_after=stop_after)
        with pytest.raises(KeyboardInterrupt):
            compared(monkeypatch, made.comparison(tmp_path / f"b{stop_after}"), cluster)
        cluster.stop_after = None
        again = compared(monkeypatch, made.comparison(tmp_path / f"b{stop_after}"), cluster)
        finished = [json.dumps(values) for values in cluster.trained if not _breaks(values)]
        assert len(finished) == len(set(finished))
        assert {json.dumps(values) for values in cluster.trained} == {json.dumps(values) for values in whole.trained}
        assert [each.against for each in again.methods] == [each.against for each in record.methods]
        ran.append(len(cluster.trained))
    assert len(ran) > 2


def test_after_the_tuning_the_final_trainings_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with said() as lines:
        made.running(monkeypatch, made.comparison(tmp_path), Cluster()).tune()
    told = [line for line in lines if line.startswith("left to do")]
    assert len(told) == 2
    assert " to " in told[0].partition(" of ")[0]
    assert told[1].startswith("left to do: 8 trainings of about 30 s")


def _breaks(values: dict[str, float]) -> bool:
    best, _ = made.BEST[str(values["adapter.method"])]
    return values["train.lr"] > 16 * best


@pytest.mark.lengthy
@pytest.mark.parametrize("reason", ["CUDA out of memory", "step 0: the held-out loss is not finite"])
def test_a_trial_that_fails_for_another_reason_ends_the_command_and_runs_again(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(reasons={2: reason})
    with pytest.raises(UserError, match=f"tuning-1: trial-002 failed: {reason}; remove the cause and run the"):
        compared(monkeypatch, made.comparison(tmp_path), cluster)
    first = list(cluster.trained)
    compared(monkeypatch, made.comparison(tmp_path), cluster)
    again = cluster.trained[len(first) :]
    assert first[2] in again
    assert not [values for number, values in enumerate(first) if number != 2 and values in again]


@pytest.mark.lengthy
def test_a_method_that_breaks_off_with_a_seed_has_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def last(config: Config) -> float:
        broken = config.adapter.method == "olora" and config.run.seed == 6
        return math.inf if broken else made.loss(config)

    record = compared(monkeypatch, made.comparison(tmp_path), Cluster(last))
    assert record.of("olora").against is None
    assert record.of("olora").broke_off() == 1
    assert report.sentences(record) == ["olora against lora: not compared, because 1 training of 4 of olora broke off."]
    assert "1 of 4 broke off" in report.cells(record, record.of("olora"))
    report.write(record, str(tmp_path))


@pytest.mark.lengthy
def test_a_method_whose_every_trial_breaks_off_leaves_the_others_their_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table once asked for its trainings, and the comparison ended without its page."""

    def last(config: Config) -> float:
        return math.inf if config.adapter.method == "pissa" else made.loss(config)

    asked = made.comparison(tmp_path, ("lora", "olora", "pissa"))
    record = compared(monkeypatch, asked, Cluster(last))
    pissa = record.of("pissa")
    assert (pissa.trainings, pissa.against, record.ratio("pissa"), record.typical("pissa")) == ((), None, None, None)
    assert report.cells(record, pissa)[-1] == "all broke off"
    assert record.of("olora").against is not None
    assert report.sentences(record)[1] == (
        "pissa against lora: not compared, because every tuning trial of pissa broke off."
    )
    report.write(record, str(tmp_path / "out"))
    assert "all broke off" in (tmp_path / "out" / "report.html").read_text()
    report.summary(record)


@pytest.mark.lengthy
def test_the_untuned_points_are_trained_once_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()
    record = compared(monkeypatch, made.comparison(tmp_path), cluster)
    assert [(point.method, point.lr) for point in record.points if not point.grid] == [("lora", 1e-3), ("olora", 1e-3)]
    assert report.untuned(record).startswith("at train.lr=0.001 for all, one seed, on the tuning rows: lora 1.0")
    on_grid = compared(monkeypatch, made.comparison(tmp_path, **{"run.name": "x", "train.lr": 4e-4}), Cluster())
    assert [point.method for point in on_grid.points if not point.grid] == ["lora"]
    assert on_grid.untuned("olora") is not None
    without = made.comparison(tmp_path, compare=Compare(untuned=False), **{"run.name": "y"})
    assert all(point.grid for point in compared(monkeypatch, without, Cluster()).points)


@pytest.mark.lengthy
def test_the_page_the_figures_and_the_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = compared(monkeypatch, made.comparison(tmp_path), Cluster())
    names = [Path(file).name for file in report.write(record, str(tmp_path / "out"))]
    assert names == ["learning_rates.png", "curves.png", "differences.png", "comparison.json", "report.html"]
    text = (tmp_path / "out" / "report.html").read_text()
    assert text.count("data:image/png;base64,") == 3
    assert "http" not in text.replace("http-equiv", "")
    for sentence in report.sentences(record):
        assert sentence.replace("'", "&#x27;") in text
    tree = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert tree["methods"][1]["against"]["adjusted"]["low"] == record.of("olora").against.adjusted.low  # type: ignore[union-attr]
    assert len(tree["methods"][0]["trainings"]) == 4
    assert tree["methods"][0]["tuned"]["cell"]["lr"] == 3.2e-3
    shown = "\n".join([*report.lines(record), *report.summary(record)])
    assert "0.0032" in shown
    assert "verdict: Loss of olora minus loss of lora = +0.0100 nats per token (95% interval" in shown
