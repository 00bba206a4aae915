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
from olora_ray.common import collectives
from olora_ray.pipeline import export, export_losses
from olora_ray.pipeline.base import open_base
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.train import checkpoints
from tests import tiny
from tests.cluster.test_sharded_worker import Context
from tests.cluster.test_worker import Channel
from tests.families.variants import LONGEST

STEPS = 3
SETTINGS: dict[str, Any] = {
    "data__train": [{"path": "unused.jsonl", "format": "messages"}],
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


@dataclass
class Outcome:
    """What a run leaves."""

    attention: str
    losses: list[float]
    held_out: list[float]
    answers: list[Sequence[int]]
    merged: list[str]
    """Digests of the merged weights, as the device and as the CPU wrote them; none of several workers."""
    sent: Mapping[str, int] = field(default_factory=dict)
    """Exchanges by NCCL's rules."""


def run(model: Path, storage: Path, device: torch.device, changes: Mapping[str, Any]) -> Outcome:
    """Train, train the last step again from a checkpoint, answer, and export unless there are several workers."""
    own = {
        "cluster__workers": collectives.world_size(),
        "run__storage": str(storage),
        "model__name": str(model),
    }
    settings = tiny.decided(**(SETTINGS | own | changes))
    base, folder, stores = (
        open_base(settings),
        RunFolder(settings.folder()),
        (tiny.store(8), tiny.store(3, seed=9)),
    )
    spec = TrainSpec(settings, base.model, base.spec.digest, base.eos, *stores)  # type: ignore[arg-type]
    with mock.patch.object(StopRequests, "_listen"):
        whole = train_at(Context(device), spec, folder.checkpoints, Channel())
        collectives.wait_for_all()
        (Path(folder.checkpoints) / checkpoints.name_of(STEPS) / "manifest.json").unlink(
            missing_ok=True
        )
        collectives.wait_for_all()
        result = train_at(Context(device), spec, folder.checkpoints, Channel())
    assert (whole.problem, result.problem) == (None, None)
    first, second = (each.state.history for each in (whole, result) if each.state)
    losses, held_out = (
        [row[name] for row in second if name in row] for name in ("train/loss", "eval/loss")
    )
    assert losses == [row["train/loss"] for row in first if "train/loss" in row]
    assert result.answers == whole.answers
    alone = collectives.world_size() == 1
    merged = [_merged(spec, folder, where) for where in (device, torch.device("cpu")) if alone]
    answers = [part for pair in result.answers for part in (pair.before, pair.after)]
    return Outcome(result.self_test["attention"], losses, held_out, answers, merged)


def _merged(spec: TrainSpec, folder: RunFolder, device: torch.device) -> str:
    here = (
        mock.patch.object(part, "assigned_device", return_value=device)
        for part in (export, export_losses)
    )
    with next(here), next(here):
        assert export.export_run(spec, folder, STEPS)["ok"]
    (file,) = Path(folder.merged).glob("*.safetensors")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    file.unlink()  # or it would be kept
    return digest
