"""An export in shares is the export of one process, and what it says of itself is kept."""

import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from olora_ray.cluster.spec import TrainSpec
from olora_ray.common.errors import UserError
from olora_ray.config.load import dump
from olora_ray.model.source import BaseModel
from olora_ray.pipeline import export, export_shares
from olora_ray.pipeline.export_shares import Part, in_turn
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.train import checkpoint
from olora_ray.train.checkpoint import TrainState
from tests import export_parts, tiny

STEP = 4
torch.set_num_threads(1)


class Run:
    """A finished training whose checkpoint is there."""

    def __init__(self, folder: Path, workers: int = 1) -> None:
        base = folder / "base"
        self.config = tiny.config(
            run__storage=str(folder / "runs"), model__name=str(base), cluster__workers=workers, data__max_length=64
        )
        self.case = export_parts.make_case(base, tiny.llama(dtype=torch.bfloat16), self.config.adapter)
        export_parts.save_tokenizer(base)
        self.folder = RunFolder(self.config.folder())
        store: Any = tiny.store(3)
        self.spec = TrainSpec(self.config, BaseModel(str(base), str(base), "digest"), "", (1,), store, None)
        place = Path(self.folder.checkpoints) / f"step-{STEP:07d}"
        state = TrainState(step=STEP)
        checkpoint.save(place, self.case.adapter, None, {}, state, {}, dump(self.config))

    def merged(self) -> dict[str, torch.Tensor]:
        return load_file(Path(self.folder.merged) / "model.safetensors")


@pytest.fixture
def small_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """A share for each worker, however small the model is."""
    monkeypatch.setattr(export_shares, "SHARE_BYTES", 1)


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
def test_a_merged_model_of_a_stopped_export_is_kept_if_its_bytes_are_right(run: Run, damaged: int | None) -> None:
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


@pytest.mark.usefixtures("small_shares")
def test_three_shares_write_what_one_process_writes(tmp_path: Path) -> None:
    one, three = Run(tmp_path / "one"), Run(tmp_path / "three", workers=3)
    export.export_run(one.spec, one.folder, STEP)
    seen: list[tuple[str, int, int]] = []

    def spread(work: Callable[[Part], Any], parts: Sequence[Part]) -> list[Any]:
        seen.extend((work.__name__, part.number, part.of) for part in parts)
        # As in other processes, and in another order.
        return in_turn(work, [pickle.loads(pickle.dumps(part)) for part in reversed(parts)])[::-1]

    measured = export.export_run(three.spec, three.folder, STEP, spread)
    assert seen == [(name, i, 3) for name in ("merge_part", "check_part") for i in range(3)]
    assert measured["ok"] is True
    assert all(torch.equal(part, three.merged()[name]) for name, part in one.merged().items())


@pytest.mark.usefixtures("small_shares")
def test_shares_in_tasks_of_ray_write_what_one_process_writes(ray_with: Callable[[int], None], tmp_path: Path) -> None:
    one, three = Run(tmp_path / "one"), Run(tmp_path / "three", workers=3)
    export.export_run(one.spec, one.folder, STEP)
    ray_with(1)
    measured = export.export_run(three.spec, three.folder, STEP, export_shares.over_cluster(1))
    assert measured["ok"] is True
    assert all(torch.equal(part, three.merged()[name]) for name, part in one.merged().items())


@pytest.mark.usefixtures("small_shares")
def test_a_share_that_was_not_merged_is_found(tmp_path: Path) -> None:
    run = Run(tmp_path, workers=3)

    def spread(work: Callable[[Part], Any], parts: Sequence[Part]) -> list[Any]:
        return in_turn(work, parts[1:] if work is export_shares.merge_part else parts)

    with pytest.raises(UserError, match=r"export: the merged weight of model\.layers.* is not base \+ change"):
        export.export_run(run.spec, run.folder, STEP, spread)
    assert run.folder.exported(run.config, STEP) is None
