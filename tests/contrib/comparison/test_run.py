"""A comparison from its first trial to its page, with invented trainings that leave real files."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from comparison import report
from comparison.arguments import Comparison
from comparison.record import ComparisonRecord, best_config, recorded
from olora_ray.common.errors import UserError
from olora_ray.config.load import dump, parse_yaml
from olora_ray.config.schema import Config
from tests import browser
from tests.contrib.comparison import made
from tests.contrib.comparison.made import Cluster


def compared(
    monkeypatch: pytest.MonkeyPatch, found: Comparison, cluster: Cluster
) -> ComparisonRecord:
    work = made.running(monkeypatch, found, cluster)
    tuning = work.tune()
    return recorded(work, tuning, work.train(tuning), "2 CPUs")


def test_each_arm_is_tuned_on_the_same_grid_and_then_compared_with_fresh_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, asked = Cluster(), made.comparison(tmp_path)
    record = compared(monkeypatch, asked, cluster)
    lora, olora = record.of("lora"), record.of("olora")
    assert lora.tuned is not None
    assert olora.tuned is not None
    assert (lora.tuned.factor, olora.tuned.factor) == (1.2, 1.0)  # 2e-3 / 1.6e-3 with two digits
    assert (lora.lr, olora.lr) == (pytest.approx(1.2 * 1.6e-3), pytest.approx(2e-4))
    assert lora.tuned.inside
    assert olora.tuned.inside
    assert lora.tunings == olora.tunings == 5
    assert (lora.tuning_seconds, lora.init_seconds, lora.trainable) == (5 * 30.0, 0.8, 4_884_480)
    assert [name for name in cluster.names if name.endswith("seed3")] == [
        f"{arm}-x{factor:g}-seed3" for arm in ("lora", "olora") for factor in (0.25, 0.5, 1, 2, 4)
    ]
    finals = [f"{arm}-seed{seed}" for seed in (4, 5, 6, 7) for arm in ("lora-x1.2", "olora-x1")]
    assert cluster.names[10:] == finals
    assert cluster.eval_every == {"tuning": {made.STEPS}, "final": {made.STEPS // 4}}
    place = Path(asked.config.folder())
    assert sorted(path.name for path in place.iterdir() if path.name != "shared") == [
        "code.json",
        "final",
        "tuning",
    ]
    assert sorted(path.name for path in (place / "final" / "trials").iterdir()) == sorted(finals)


def test_the_difference_is_that_of_the_losses_with_its_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = compared(monkeypatch, made.comparison(tmp_path), Cluster())
    against = record.of("olora").against
    assert against is not None
    assert against.mean == pytest.approx(0.01, abs=1e-3)  # the luck of a seed is in both
    assert against.interval == against.adjusted  # one comparison
    assert against.interval.low < 0.01 < against.interval.high
    lora = record.of("lora")
    assert lora.loss is not None
    assert lora.loss == pytest.approx(sum(each.loss for each in lora.trainings) / 4)
    assert record.base_test == record.base_tuning == made.BASE
    first, half, last = lora.course()
    assert first > half > last == pytest.approx(lora.loss, abs=1e-6)
    row = dict(zip(report.MEANS, report.cells(record, lora), strict=True))
    assert (row["learning rate"], row["x rate"], row["tuning"]) == (
        "0.0019",
        "1.2",
        "5 in 2 min 30 s",
    )
    assert (row["after 25%"], row["after 50%"]) == (f"{first:.4f}", f"{half:.4f}")


def test_more_seeds_and_another_arm_train_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster()
    first = compared(monkeypatch, made.comparison(tmp_path), cluster)
    monkeypatch.setitem(made.BEST, "pissa", (1e-3, 0.95))
    pissa = made.arm("pissa", adapter__method="pissa")
    done = len(cluster.names)
    second = compared(
        monkeypatch, made.comparison(tmp_path, (made.LORA, made.OLORA, pissa), seeds=5), cluster
    )
    assert cluster.names[done:] == [
        *(f"pissa-x{factor:g}-seed3" for factor in (0.25, 0.5, 1, 2, 4)),
        *(f"pissa-x1-seed{seed}" for seed in (4, 5, 6, 7)),
        *("lora-x1.2-seed8", "olora-x1-seed8", "pissa-x1-seed8"),
    ]
    assert second.of("olora").trainings[:4] == first.of("olora").trainings
    assert [len(each.trainings) for each in second.arms] == [5, 5, 5]
    olora = second.of("olora").against
    assert olora is not None
    assert olora.adjusted.high > olora.interval.high  # two comparisons
    assert "for 2 comparisons together" in report.sentence(second, second.of("olora"))


def test_it_ends_with_a_config_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = made.arm("narrow", adapter__method="lora", adapter__rank=8, train__lr=4e-4)
    asked = made.comparison(tmp_path, (made.OLORA, narrow))
    asked = replace(
        asked, own=made.override(asked.own, {"train.early_stop": 3, "registry.model": "task"})
    )
    record = compared(monkeypatch, asked, Cluster())
    best = record.best()
    assert best is not None
    assert best.name == "narrow"
    config = best_config(asked, record)
    assert config is not None
    assert (config.adapter.method, config.adapter.rank, config.train.lr) == ("lora", 8, 4e-4)
    assert config.train.lr_factor * 4e-4 == pytest.approx(best.lr)
    assert (config.train.early_stop, config.registry.model) == (3, "task")
    assert config.run.name == "task-compare-best"
    assert config.train.eval_every == asked.own.train.eval_every
    assert parse_yaml(dump(config), "best.yaml")["train"]["lr"] == 4e-4


def test_an_interrupted_comparison_trains_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Cluster()
    record = compared(monkeypatch, made.comparison(tmp_path / "a"), whole)
    for stop_after in (1, 7, 12, 17):
        cluster, asked = (
            Cluster(stop_after=stop_after),
            made.comparison(tmp_path / f"b{stop_after}"),
        )
        with pytest.raises(KeyboardInterrupt):
            compared(monkeypatch, asked, cluster)
        cluster.stop_after = None
        again = compared(monkeypatch, asked, cluster)
        assert cluster.names == whole.names
        assert [each.against for each in again.arms] == [each.against for each in record.arms]


@pytest.mark.parametrize(
    "reason", ["CUDA out of memory", "step 0: the held-out loss is not finite"]
)
def test_a_trial_that_fails_for_another_reason_ends_the_command_and_runs_again(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(reasons={"lora-x1-seed3": reason})
    with pytest.raises(
        UserError, match=f"tuning: lora-x1-seed3 failed: {reason}; remove the cause and run the"
    ):
        compared(monkeypatch, made.comparison(tmp_path), cluster)
    done = len(cluster.names)
    compared(monkeypatch, made.comparison(tmp_path), cluster)
    again = cluster.names[done:]
    assert again[0] == "lora-x1-seed3"
    assert not set(again[1:]) & set(cluster.names[:done])


def test_an_arm_whose_every_trial_breaks_off_leaves_the_others_their_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table once asked for its trainings, and the comparison ended without its page."""

    def last(config: Config) -> float:
        return math.inf if config.adapter.method == "pissa" else made.loss(config)

    asked = made.comparison(
        tmp_path, (made.LORA, made.OLORA, made.arm("pissa", adapter__method="pissa"))
    )
    record = compared(monkeypatch, asked, Cluster(last))
    pissa = record.of("pissa")
    assert (pissa.trainings, pissa.against, pissa.course(), pissa.lr) == ((), None, (), None)
    assert report.cells(record, pissa)[-2:] == ["all broke off", ""]
    assert record.of("olora").against is not None
    assert report.sentences(record)[1] == (
        "pissa beside lora: not compared, because every tuning trial of pissa broke off."
    )
    report.write(record, str(tmp_path / "out"))
    assert "all broke off" in (tmp_path / "out" / "report.html").read_text()
    report.lines(record)


def test_the_page_the_figures_and_the_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = compared(monkeypatch, made.comparison(tmp_path), Cluster())
    names = [Path(file).name for file in report.write(record, str(tmp_path / "out"))]
    assert names == ["learning_rates.png", "differences.png", "comparison.json", "report.html"]
    text = (tmp_path / "out" / "report.html").read_text()
    assert text.count("data:image/png;base64,") == 2
    assert "http" not in text.replace("http-equiv", "")
    for sentence in report.sentences(record):
        assert sentence.replace("'", "&#39;") in text
    if browser.CHROMIUM is not None:
        assert browser.first_screen(tmp_path / "out" / "report.html") == [(True, True)] * 2
    tree = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert tree["arms"][1]["against"]["adjusted"]["low"] == record.of("olora").against.adjusted.low  # type: ignore[union-attr]
    assert len(tree["arms"][0]["trainings"]) == 4
    assert tree["arms"][0]["tuned"]["factor"] == 1.2
    shown = "\n".join(report.lines(record))
    assert "0.0019" in shown
    assert "Difference of the losses: +0.0" in shown
