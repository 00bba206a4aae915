"""An export is written and checked, and what it says of itself is kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from olora_ray.cluster.spec import TrainSpec
from olora_ray.config.load import dump
from olora_ray.model.source import BaseModel
from olora_ray.pipeline import export
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.train import checkpoint
from olora_ray.train.checkpoint import TrainState
from tests import export_parts, tiny

STEP = 4
torch.set_num_threads(1)


class Run:
    """A finished training whose checkpoint is there."""

    def __init__(self, folder: Path) -> None:
        base = folder / "base"
        self.config = tiny.decided(
            run__storage=str(folder / "runs"),
            model__name=str(base),
            data__max_length=64,
            data__train=[{"path": "unused.jsonl", "format": "messages"}],
        )
        self.case = export_parts.make_case(
            base, tiny.llama(dtype=torch.bfloat16), self.config.adapter
        )
        export_parts.save_tokenizer(base)
        self.folder = RunFolder(self.config.folder())
        store: Any = tiny.store(3)
        self.spec = TrainSpec(
            self.config, BaseModel(str(base), str(base), "digest"), "", (1,), store, None
        )
        place = Path(self.folder.checkpoints) / f"step-{STEP:07d}"
        state = TrainState(step=STEP)
        checkpoint.save(place, self.case.adapter, None, {}, state, {}, dump(self.config))

    def merged(self) -> dict[str, torch.Tensor]:
        return load_file(Path(self.folder.merged) / "model.safetensors")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_an_export_is_written_and_checked(run: Run) -> None:
    measured = export.export_run(run.spec, run.folder, STEP)
    assert run.folder.exported(run.config, STEP) == json.loads(json.dumps(measured))
    assert measured["ok"] is True
    assert measured["merged"]["weights"]["error"] <= 1
    assert measured["merged"]["weights"]["stored"] == "bfloat16"
    assert measured["peft"]["error"] < 1e-6
    assert measured["logits"]["merged"]["median"] <= measured["logits"]["merged"]["bound"]
    assert (Path(run.folder.adapter) / "README.md").is_file()
    assert not list(Path(run.folder.merged).parent.glob(".*")), "no leftovers"


@pytest.mark.parametrize("damaged", [None, 8, -1])
def test_a_merged_model_of_a_stopped_export_is_kept_if_its_bytes_are_right(
    run: Run, damaged: int | None
) -> None:
    export.export_run(run.spec, run.folder, STEP)
    file = Path(run.folder.merged) / "model.safetensors"
    number, right = file.stat().st_ino, file.read_bytes()
    if damaged is not None:
        wrong = bytearray(right)
        wrong[damaged] ^= 1
        file.write_bytes(wrong)
    assert export.export_run(run.spec, run.folder, STEP)["ok"]
    assert (file.stat().st_ino == number) == (damaged is None)
    assert file.read_bytes() == right
