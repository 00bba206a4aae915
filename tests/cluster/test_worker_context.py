"""Several adapters on one base: each comes out as if it had been alone, and the base is never changed."""

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from olora_ray.adapter.initialise import initialise
from olora_ray.adapter.inject import find_targets, wrap
from olora_ray.cluster import worker_context
from olora_ray.cluster.worker_context import SharedBase, SharedBaseContext, common_dtype, load_loss
from olora_ray.common import collectives
from olora_ray.common.errors import UserError
from olora_ray.model.source import BaseModel
from olora_ray.train.held_out import evaluate
from olora_ray.train.loop import Trainer
from olora_ray.train.loss import SupervisedLoss
from tests import tiny
from tests.crew import Crews
from tests.said import said

CPU = torch.device("cpu")
STEPS = 5
MEMBERS: tuple[dict[str, Any], ...] = (
    {"adapter__rank": 4, "train__lr": 1e-2},
    {"adapter__rank": 8, "adapter__alpha": 4, "train__lr": 3e-3, "adapter__dropout": 0.1},
    {"adapter__method": "lora", "train__lr": 1e-2, "adapter__targets": ("q_proj", "down_proj")},
)


def base() -> SharedBase:
    return SharedBase(SupervisedLoss(tiny.llama(attention="segments")), CPU)


def train(shared: SharedBase, changes: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """The flat vector of adapters after training, and the held-out loss, taking turns with whoever else is there."""
    settings, store = tiny.decided(train__steps=STEPS, **changes), tiny.store(8)
    context, adapter = SharedBaseContext(shared), settings.adapter
    with context.activate({}):
        model = shared.loss.model
        targets = find_targets(model, adapter.targets, adapter.rank)
        factors, _ = initialise(targets, adapter.method, adapter.rank, settings.run.seed, CPU)
        adapted = wrap(model, factors, adapter.scale(), adapter.dropout)
    with context.activate(adapted):
        trainer = Trainer(shared.loss, adapted, settings, CPU)
    steps = tiny.steps(trainer, store)
    while True:
        with context.activate(adapted):
            if next(steps, None) is None:
                break
    with context.activate(adapted):
        return trainer.flat.vector.clone(), evaluate(trainer, store, "segments").loss


def in_threads(functions: list[Callable[[], Any]]) -> list[Any]:
    results: list[Any] = [None] * len(functions)

    def run(place: int) -> None:
        results[place] = functions[place]()

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_adapters_that_share_a_base_train_as_if_each_were_alone() -> None:
    alone = [train(base(), changes) for changes in MEMBERS]
    shared = base()
    before = {name: value.clone() for name, value in shared.loss.state_dict().items()}
    together = in_threads([lambda changes=changes: train(shared, changes) for changes in MEMBERS])  # type: ignore[misc]
    for (vector, loss), (wanted, wanted_loss) in zip(together, alone, strict=True):
        assert torch.equal(vector, wanted)
        assert loss == wanted_loss
    assert not any(torch.equal(vector, torch.zeros_like(vector)) for vector, _ in together)
    after = shared.loss.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def load_what_lies_there(folders: list[str]) -> None:
    """In a worker: load the model of its node."""
    base = BaseModel("/models/m", folders[collectives.rank()], "digest")
    spec = SimpleNamespace(base=base, config=tiny.decided(cluster__workers=2))
    load_loss(spec, CPU, "float32")


@pytest.mark.parametrize("problem", ["is not on every node", "no such file or directory"])
def test_a_model_that_one_node_does_not_have_ends_all_workers(
    problem: str, crew: Crews, tmp_path: Path
) -> None:
    """The others waited for its worker until their exchange timed out, and nobody told why."""
    tiny.llama().save_pretrained(tmp_path / "whole")
    other = tmp_path / "other"
    if "directory" in problem:
        other.mkdir()  # without the files
    found = crew(2).run(load_what_lies_there, [str(tmp_path / "whole"), str(other)])
    assert [type(each) for each in found] == [UserError, UserError]
    assert problem in str(found[0]).lower()
    assert str(found[0]) == str(found[1])


def _agreed(fast: tuple[bool, bool], dtype: str, began: str | None = None) -> tuple[str, list[str]]:
    """The precision that is loaded on a worker, where some are fast at bfloat16, and what is said."""
    with pytest.MonkeyPatch.context() as patch, said() as lines:
        own = torch.bfloat16 if fast[dist.get_rank()] else torch.float32
        patch.setattr(
            worker_context,
            "pick_dtype",
            lambda model, _: own if model.dtype == "auto" else torch.bfloat16,
        )
        return common_dtype(tiny.decided(model__dtype=dtype), CPU, began), lines


@pytest.mark.parametrize(
    ("fast", "asked", "began", "dtype", "told"),
    [
        ((True, False), "auto", None, "float32", "1 of 2 workers are not fast at bfloat16"),
        ((True, True), "auto", None, "bfloat16", ""),
        ((True, False), "bfloat16", None, "bfloat16", ""),
        # Resumed on other nodes, or joined by a worker of another kind, it went on in theirs.
        ((False, False), "auto", "bfloat16", "bfloat16", "keeping bfloat16, "),
        ((True, True), "auto", "float32", "float32", "keeping float32, "),
        ((True, True), "auto", "bfloat16", "bfloat16", ""),
        ((False, False), "bfloat16", "float32", "bfloat16", ""),
    ],
)
def test_workers_compute_in_one_precision_and_stay_in_that_of_the_run(
    crew: Crews,
    fast: tuple[bool, bool],
    asked: str,
    began: str | None,
    dtype: str,
    told: str,
) -> None:
    for found, lines in crew(2).run(_agreed, fast, asked, began):
        assert found == dtype
        assert len(lines) == bool(told)
        assert told in "".join(lines)
