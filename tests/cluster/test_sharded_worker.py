"""Workers that hold a part of the base each, from start to result: the same bytes as with the whole base."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from olora_ray.cluster import worker_context
from olora_ray.cluster.spec import TrainSpec
from olora_ray.cluster.worker import StopRequests, train_at
from olora_ray.cluster.worker_context import RayTrainContext
from olora_ray.model.source import BaseModel
from olora_ray.train import checkpoints
from tests import tiny
from tests.cluster.test_worker import SETTINGS, Channel, adapter, same
from tests.crew import Crews
from tests.families import every, zoo
from tests.families.variants import ALL

CPU = torch.device("cpu")
LEAVES_OUT = "deepseek_v32"
"""A family whose blocks have layers that no gradient reaches."""


class Context(RayTrainContext):
    """That of a worker of Ray Train, with what Ray would say of it."""

    def __init__(self, device: torch.device = CPU) -> None:
        self.device, self._loss, self._installed = device, None, False


def run(
    model: Path, storage: Path, strategy: str, changes: dict[str, Any]
) -> tuple[Any, Any, Any, bool]:
    """Told losses, answers and self-test of a run, and whether the base was read by rows."""
    sizes = {
        "cluster__workers": dist.get_world_size(),
        "cluster__strategy": strategy,
        "train__micro_batch": 1,
    }
    settings = tiny.decided(
        **(SETTINGS | {"model__name": str(model), "model__dtype": "bfloat16"} | sizes | changes)
    )
    train = tiny.store(8)
    held_out = tiny.store(3, seed=9)
    spec = TrainSpec(
        settings, BaseModel("m", str(model), str(model)), "tokenizer", (1,), train, held_out
    )
    channel, context = Channel(), Context()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopRequests, "_listen", lambda self: None)
        result = train_at(context, spec, str(storage), channel)
    assert (result.problem, result.interrupted) == (None, None)
    told = [channel.metrics(name) for name in ("train/loss", "eval/loss", "train/grad_norm")]
    differences = {
        name: value for name, value in (result.self_test or {}).items() if "seconds" not in name
    }
    return told, result.answers, differences, context._loss.read_rows is not None


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"adapter__method": "pissa", "train__lr": "auto"}),
        pytest.param("mixtral", {"train__optimizer": "spectral"}, marks=pytest.mark.slow),
        (
            "gpt2",
            {
                "adapter__method": "eva",
                "adapter__init_tokens": 96,
                "data__max_length": 64,
                "train__optimizer": "spectral",
            },
        ),
        pytest.param(LEAVES_OUT, {}, marks=pytest.mark.slow),
    ],
)
def test_a_run_on_parts_of_the_base(
    crew: Crews, tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    model, whole, parts = (tmp_path / name for name in ("model", "whole", "parts"))
    zoo.build(every.variant_of(family), model)
    (first, _), (second, other) = (
        crew(2).run(run, model, folder, strategy, changes)
        for folder, strategy in ((whole, "ddp"), (parts, "fsdp"))
    )
    assert (first[3], second[3], other[3]) == (False, True, True)
    assert second[:3] == first[:3]
    assert same(adapter(parts, 6), adapter(whole, 6))
    assert not any("indexer" in name for name in adapter(parts, 6))
    (parts / checkpoints.name_of(6) / "manifest.json").unlink()
    resumed, _ = crew(2).run(run, model, parts, "fsdp", changes)
    assert list(resumed[0][0]) == [4, 5, 6]
    assert same(adapter(parts, 6), adapter(whole, 6))


def _run_where(fast: bool, model: Path, storage: Path) -> None:
    """A run with `model.dtype: auto` on processors that are, or are not, fast at bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            worker_context, "pick_dtype", lambda *_: torch.bfloat16 if fast else torch.float32
        )
        run(model, storage, "ddp", {"model__dtype": "auto"})


def test_a_run_that_goes_on_on_other_processors_ends_with_the_same_bytes(
    crew: Crews, tmp_path: Path
) -> None:
    """`auto` meant another precision there, and the warning spoke of last bits."""
    model, whole, moved = (tmp_path / name for name in ("model", "whole", "moved"))
    zoo.build(ALL["llama"], model)
    for folder in (whole, moved):
        crew(1).run(_run_where, True, model, folder)
    (moved / checkpoints.name_of(6) / "manifest.json").unlink()
    crew(1).run(_run_where, False, model, moved)
    assert same(adapter(moved, 6), adapter(whole, 6))
