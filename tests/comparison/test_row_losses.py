"""The losses on each test row are those of the adapter after the last step, even if an earlier one was better."""

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from comparison import row_losses
from comparison.row_losses import FILE, RowLosses
from olora_ray.adapter.layer import AdapterWeights
from olora_ray.cluster.spec import TrainResult, TrainSpec
from olora_ray.cluster.worker import StopRequests, train_at
from olora_ray.cluster.worker_context import SharedBase, SharedBaseContext
from olora_ray.common.errors import UserError
from olora_ray.config.load import override
from olora_ray.model.source import BaseModel
from olora_ray.train import checkpoints
from olora_ray.train.loss import SupervisedLoss
from tests import tiny


def shared() -> SharedBase:
    return SharedBase(SupervisedLoss(tiny.llama(attention="segments")), torch.device("cpu"))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings; lines of lower levels depend on other tests."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def trained(folder: Path, monkeypatch: pytest.MonkeyPatch, method: str, lr: float) -> tuple[TrainSpec, TrainResult]:
    monkeypatch.setattr(StopRequests, "_listen", lambda self: None)
    store: Any = tiny.store(8)
    held_out: Any = tiny.store(5, seed=9)
    settings = tiny.config(
        train__steps=4, train__eval_every=1, train__lr=lr, evaluation__samples=0, adapter__method=method
    )
    spec = TrainSpec(settings, BaseModel("m", "/m", "base"), "tokenizer", (1,), store, held_out)
    channel: Any = SimpleNamespace(
        send=SimpleNamespace(remote=lambda message: None), wait_for_stop=SimpleNamespace(remote=lambda: None)
    )
    return spec, train_at(SharedBaseContext(shared()), spec, str(folder / "checkpoints"), channel)


def last(folder: Path) -> dict[str, AdapterWeights]:
    newest = checkpoints.latest_good(str(folder / "checkpoints"))
    assert newest is not None
    return newest[1].adapter


@pytest.mark.lengthy
@pytest.mark.parametrize(("method", "lr"), [("olora", 1e-3), ("lora", 0.3)])
def test_they_add_up_to_the_last_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, lr: float, caplog: pytest.LogCaptureFixture
) -> None:
    spec, result = trained(tmp_path, monkeypatch, method, lr)
    assert result.state is not None
    curve = [row["eval/loss"] for row in result.state.history if "eval/loss" in row]
    if lr > 0.1:
        assert curve[-1] > min(curve) + 0.01  # the best adapter is another
    base = shared()
    untouched = {name: id(module) for name, module in base.loss.model.named_modules()}  # type: ignore[operator]
    found = row_losses.of_trial(base, spec, str(tmp_path), "segments")
    assert found.mean() == pytest.approx(curve[-1], rel=1e-5)
    assert {name: id(module) for name, module in base.loss.model.named_modules()} == untouched  # type: ignore[operator]
    assert found.trainable == sum(each.da.numel() + each.db.numel() for each in last(tmp_path).values())
    assert len(found.losses) == len(found.places) == 15  # 5 sequences of 3 examples
    assert found.places[:4] == ("rows.jsonl:0", "rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:10")
    assert not warnings_of(caplog)
    row_losses._compare(found, [{"eval/loss": curve[-1] + 0.5}], "here")
    (line,) = warnings_of(caplog)
    assert "here: its rows have the loss" in line


@pytest.mark.lengthy
def test_those_of_a_sharded_base_are_measured_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainings may use an attention that needs a GPU."""
    spec, _ = trained(tmp_path, monkeypatch, "olora", 1e-3)
    asked: list[tuple[str, str]] = []

    def of(cls: type[SharedBase], spec: TrainSpec, device: torch.device) -> SharedBase:
        asked.append((spec.config.model.attention, device.type))
        return shared()

    monkeypatch.setattr(SharedBase, "of", classmethod(of))
    changes = {"cluster.strategy": "fsdp", "model.attention": "varlen"}
    row_losses.measure([(str(tmp_path), replace(spec, config=override(spec.config, changes)))])
    assert asked == [("auto", "cpu")]
    assert RowLosses.read(str(tmp_path), "list") is not None


@pytest.mark.lengthy
def test_the_layout_changes_nothing_but_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, _ = trained(tmp_path, monkeypatch, "olora", 1e-2)
    packed = row_losses.of_trial(shared(), spec, str(tmp_path), "segments")
    single: Any = tiny.ListStore(tiny.unpacked([spec.eval[number] for number in range(5)]))  # type: ignore[index]
    object.__setattr__(spec, "eval", single)
    alone = row_losses.of_trial(shared(), spec, str(tmp_path), "segments")
    assert alone.tokens == packed.tokens
    assert alone.losses == pytest.approx(packed.losses, rel=1e-5)


@pytest.mark.lengthy
def test_a_lost_checkpoint_and_one_of_another_training_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spec, _ = trained(tmp_path, monkeypatch, "olora", 1e-2)
    other = TrainSpec(tiny.config(adapter__method="lora"), spec.base, spec.tokenizer, spec.eos, spec.train, spec.eval)
    with pytest.raises(UserError, match="another adapter"):
        row_losses.of_trial(shared(), other, str(tmp_path), "segments")
    caplog.set_level(logging.ERROR)
    places = sorted((tmp_path / "checkpoints").glob("step-*"), reverse=True)
    assert len(places) > 1
    for place in places:  # with the first of them an earlier adapter would be compared
        (place / "manifest.json").unlink()
        with pytest.raises(UserError, match=r"the last checkpoint is lost; delete .* and run the same command again"):
            row_losses.of_trial(shared(), spec, str(tmp_path), "segments")


def test_rows_of_a_group_are_summed() -> None:
    found = RowLosses("d", ("a.jsonl:1", "b.jsonl:1", "a.jsonl:2", "a.jsonl:2"), (1, 2, 3, 4), (0.5, 1.0, 1.5, 2.0), 8)
    losses, tokens = found.by_group({"a.jsonl": (0, 1), "b.jsonl": (0,)})
    np.testing.assert_array_equal(losses, [1.5, 3.5])
    np.testing.assert_array_equal(tokens, [3, 7])


@pytest.mark.parametrize("damage", [{"data": "other"}, {"tokens": [1]}, {"losses": "x"}, {"trainable": None}, None])
def test_what_is_kept_is_of_these_rows_and_whole(tmp_path: Path, damage: dict[str, Any] | None) -> None:
    found = RowLosses("d", ("a.jsonl:1", "a.jsonl:2"), (1, 2), (0.5, 1.0), 8)
    place = tmp_path / FILE
    assert RowLosses.read(str(tmp_path), "d") is None
    place.write_text(json.dumps(asdict(found)))
    assert RowLosses.read(str(tmp_path), "d") == found
    place.write_text(json.dumps(asdict(found) | damage) if damage else "{")
    assert RowLosses.read(str(tmp_path), "d") is None
