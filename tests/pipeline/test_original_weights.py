"""An adapter of a quantised base is exported for the original weights, and what that changes is said."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from olora_ray.config.load import override
from olora_ray.pipeline import export, export_shares
from olora_ray.train.parallel import load_frozen
from tests import tiny
from tests.packed import unpack
from tests.pipeline.test_compressed import by_peft, spec_of
from tests.pipeline.test_export_shares import STEP, Run
from tests.said import said

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_the_loss_on_both_bases_is_measured_and_told(run: Run, tmp_path: Path) -> None:
    spec = spec_of(run, model__quantization="fp8")
    with said() as lines:
        measured = export.export_run(spec, run.folder, STEP)
    found, held_out = measured["quantised"], spec.eval
    assert held_out is not None
    packs = [held_out[number] for number in range(3)]
    # The adapter as PEFT reads it, on the weights that were trained on, and on the original ones.
    unpack(load_frozen(run.case.base, spec.config.model, CPU)).save_pretrained(tmp_path / "unpacked")
    on_both = [by_peft(run, Path(run.folder.adapter), packs, base) for base in (tmp_path / "unpacked", run.case.base)]
    assert [found["loss"]["before"], found["loss"]["after"]] == pytest.approx(on_both, rel=1e-5)
    assert abs(found["loss"]["difference"]) > 1e-4
    text = f"trained on the base as fp8, exported for the original weights: held-out loss {on_both[0]:.4f} on the"
    card = (Path(run.folder.adapter) / "README.md").read_text()
    assert f"- Base in the training: {text}" in card
    assert "are those of the trained adapter on the original weights but for rounding" in card
    assert [line for line in lines if line.startswith(f"adapter: {text}")]
    assert found["in_words"].startswith(text)


def test_the_merged_model_is_that_of_an_unquantised_training(run: Run) -> None:
    export.export_run(spec_of(run), run.folder, STEP)
    before = run.merged()
    measured = export.export_run(spec_of(run, model__quantization="fp8"), run.folder, STEP)
    assert measured["ok"] is True
    assert measured["merged"]["weights"]["error"] <= 1
    after = run.merged()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_without_held_out_rows_it_is_the_loss_on_training_rows(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_shares, "LOSS_TOKENS", 1)
    spec = spec_of(run, 0, model__quantization="fp8", export__merged=False)
    found = export.export_run(spec, run.folder, STEP)["quantised"]
    assert found["rows"] == "training"
    assert found["loss"]["tokens"] == spec.train.supervised([0])  # type: ignore[attr-defined]
    assert "original weights: loss on training rows " in found["in_words"]


def test_why_it_is_not_measured_is_said_in_the_report_and_not_on_the_card(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_shares, "choose_attention", lambda *_: {}["/home/someone/model"])
    found = export.export_run(spec_of(run, model__quantization="fp8", export__merged=False), run.folder, STEP)
    assert found["quantised"]["in_words"].endswith(
        "is not measured on both: the model does not run here: '/home/someone/model'"
    )
    card = (Path(run.folder.adapter) / "README.md").read_text()
    assert "exported for the original weights; the held-out loss is not measured on both\n" in card
    assert "/home" not in card


def test_an_unquantised_training_says_nothing_of_it(run: Run) -> None:
    spec: Any = replace(run.spec, config=override(run.config, {"export.merged": False}), eval=tiny.store(1))
    assert "quantised" not in export.export_run(spec, run.folder, STEP)
    assert "Base in the training" not in (Path(run.folder.adapter) / "README.md").read_text()
