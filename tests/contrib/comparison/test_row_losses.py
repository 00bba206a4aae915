"""The losses on each test row are those of the adapter after the last step, even if an earlier one was better."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from comparison import row_losses
from comparison.row_losses import RowLosses
from olora_ray.cluster.spec import TrainSpec
from olora_ray.cluster.worker import StopRequests, train_at
from olora_ray.cluster.worker_context import SharedBase, SharedBaseContext
from olora_ray.common.errors import UserError
from olora_ray.model.source import BaseModel
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.train.loss import SupervisedLoss
from tests import tiny


@pytest.mark.parametrize(("method", "lr"), [("olora", 1e-3), ("lora", 0.3)])
def test_they_add_up_to_the_last_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, lr: float
) -> None:
    monkeypatch.setattr(StopRequests, "_listen", lambda self: None)
    store: Any = tiny.store(8)
    held_out: Any = tiny.store(5, seed=9)
    guard: Any = tiny.store(2, seed=11)
    settings = tiny.config(
        train__steps=4,
        train__eval_every=1,
        train__lr=lr,
        evaluation__samples=0,
        adapter__method=method,
        run__storage=str(tmp_path),
    )
    spec = TrainSpec(
        tiny.decided(settings),
        BaseModel("m", "/m", "base"),
        "tokenizer",
        (1,),
        store,
        held_out,
        each_example=True,
        guard=guard,
    )
    channel: Any = SimpleNamespace(
        send=SimpleNamespace(remote=lambda message: None),
        wait_for_stop=SimpleNamespace(remote=lambda: None),
    )
    folder, places = RunFolder(settings.folder()), row_losses.places_of(held_out)
    with pytest.raises(
        UserError, match=r"the losses of the test rows are lost; delete .* and run the same command"
    ):
        row_losses.result_of(folder.root, settings, len(places))
    shared = SharedBase(SupervisedLoss(tiny.llama(attention="segments")), torch.device("cpu"))
    result = train_at(SharedBaseContext(shared), spec, folder.checkpoints, channel)
    folder.write_training(result)
    assert result.state is not None
    curve = [row["eval/loss"] for row in result.state.history if "eval/loss" in row]
    if lr > 0.1:
        assert curve[-1] > min(curve) + 0.01  # the best adapter is another
    losses, trainable, precision, forgotten = row_losses.result_of(
        folder.root, settings, len(places)
    )
    packs = [held_out[number] for number in range(len(held_out))]
    tokens = tuple(each.supervised for pack in packs for each in pack.examples())
    found = RowLosses(places, tokens, losses, trainable)
    of_guard = [row["eval/guard/loss"] for row in result.state.history if "eval/loss" in row]
    assert len(of_guard) == len(curve)
    assert of_guard[0] not in curve
    assert forgotten == of_guard[-1] - of_guard[0] != 0
    assert precision == result.state.precision is not None
    assert found.mean() == pytest.approx(curve[-1], rel=1e-12)
    assert found.trainable == tiny.trainer(settings).flat.vector.numel()
    assert len(found.losses) == len(found.places) == 15  # 5 sequences of 3 examples
    assert found.places[:4] == ("rows.jsonl:0", "rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:10")
