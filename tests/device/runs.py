"""A run as its worker does it, from a model folder to the exports, on a device."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from olora_ray.cluster.spec import TrainSpec
from olora_ray.cluster.worker import StopRequests, train_at
from olora_ray.cluster.worker_context import RayTrainContext
from olora_ray.common import collectives
from olora_ray.pipeline import export, export_shares
from olora_ray.pipeline.base import open_base
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.train import checkpoints
from tests import tiny
from tests.cluster.test_worker import Channel
from tests.families.variants import LONGEST

STEPS = 3
SETTINGS: dict[str, Any] = {
    "data__max_length": LONGEST,
    "data__eval_fraction": 0.1,
    "train__steps": STEPS,
    "train__checkpoint_every": 2,
    "train__eval_every": 1,
    "train__global_batch": 6,
    "evaluation__samples": 2,
    "evaluation__max_new_tokens": 4,
    "adapter__dropout": 0.0,  # the device takes another attention than the CPU, and so other shapes
}


@dataclass(frozen=True)
class Outcome:
    """What a run leaves."""

    attention: str
    losses: list[float]
    held_out: list[float]
    answers: list[Sequence[int]]
    merged: tuple[str, str] = ("", "")
    """Digests of the merged weights, as the device and as the CPU wrote them."""
    sent: Mapping[str, int] = field(default_factory=dict)
    """Exchanges by NCCL's rules."""


class Context(RayTrainContext):
    """That of a worker of Ray Train, with what Ray would say of it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._loss, self._installed = device, None, False


def run(model: Path, storage: Path, device: torch.device, changes: Mapping[str, Any], recompute: bool = False) -> Outcome:
    """Train, train the last step again from a checkpoint, answer, and export unless there are several workers."""
    sizes = {"cluster__workers": collectives.world_size(), "run__storage": str(storage), "model__name": str(model)}
    settings = tiny.config(**(SETTINGS | sizes | changes))
    base, folder = open_base(settings), RunFolder(settings.folder())
    train: Any = tiny.store(8)
    other: Any = tiny.store(3, seed=9)
    spec = TrainSpec(settings, base.model, base.spec.digest, base.eos, train, other, recompute=recompute)
    with mock.patch.object(StopRequests, "_listen", lambda self: None):
        whole = train_at(Context(device), spec, folder.checkpoints, Channel())
        _forget(folder, STEPS)
        result = train_at(Context(device), spec, folder.checkpoints, Channel())
    assert (whole.problem, result.problem) == (None, None)
    assert whole.state is not None
    assert result.state is not None
    losses, held_out = ([row[name] for row in result.state.history if name in row] for name in ("train/loss", "eval/loss"))
    assert losses == [row["train/loss"] for row in whole.state.history if "train/loss" in row]
    assert result.answers == whole.answers
    assert result.self_test is not None
    merged = ("", "")
    if collectives.world_size() == 1:
        written = [_merged(spec, folder, result.state.step, where) for where in (device, torch.device("cpu"))]
        merged = (written[0], written[1])
    pairs = [part for pair in result.answers for part in (pair.before, pair.after)]
    return Outcome(result.self_test["attention"], losses, held_out, pairs, merged)


def _forget(folder: RunFolder, step: int) -> None:
    """Let the checkpoint of a step count as incomplete, as if the run had been ended while it was written."""
    manifest = Path(folder.checkpoints) / checkpoints.name_of(step) / "manifest.json"
    collectives.wait_for_all()
    manifest.unlink(missing_ok=True)
    collectives.wait_for_all()


def _merged(spec: TrainSpec, folder: RunFolder, step: int, device: torch.device) -> str:
    with (
        mock.patch.object(export, "assigned_device", lambda: device),
        mock.patch.object(export_shares, "assigned_device", lambda: device),
    ):
        assert export.export_run(spec, folder, step)["ok"]
    (file,) = Path(folder.merged).glob("*.safetensors")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    file.unlink()  # or it would be kept
    return digest
