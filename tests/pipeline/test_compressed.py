"""A compressed adapter says what it costs on held-out rows; the model card tells that, and what the checks found."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM

from olora_ray.cluster.spec import TrainSpec
from olora_ray.common.errors import UserError
from olora_ray.config.load import override
from olora_ray.pipeline import export, export_shares
from olora_ray.pipeline.export_shares import Compressed
from tests import tiny
from tests.pipeline.test_export_shares import STEP, Run
from tests.said import said


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def spec_of(run: Run, packs: int = 3, **changes: Any) -> TrainSpec:
    """In float32, with held-out rows."""
    fields = {name.replace("__", "."): value for name, value in changes.items()}
    held_out: Any = tiny.store(packs, seed=4) if packs else None
    return replace(run.spec, config=override(run.config, {"model.dtype": "float32", **fields}), eval=held_out)


@torch.no_grad()
def by_peft(run: Run, adapter: Path, packs: Sequence[Any], base: Path | None = None) -> float:
    """The loss of an adapter folder on its base, or another, by transformers and PEFT, one example at a time."""
    plain = AutoModelForCausalLM.from_pretrained(base or run.case.base, dtype=torch.float32)
    model, losses = PeftModel.from_pretrained(plain, str(adapter)), []
    for example in tiny.unpacked(packs):
        ids = torch.tensor(example.input_ids, dtype=torch.int64)
        each = F.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
        losses.append(each[torch.tensor(example.supervised[1:])])
    return float(torch.cat(losses).mean())


def test_the_loss_is_that_of_both_adapters(run: Run, tmp_path: Path) -> None:
    spec = spec_of(run, export__rank=2)
    with said() as lines:
        found = export.export_run(spec, run.folder, STEP)["compressed"]
    assert spec.eval is not None
    packs = [spec.eval[number] for number in range(3)]
    before, after = found["loss"]["before"], found["loss"]["after"]
    assert before == pytest.approx(by_peft(run, run.case.write_adapter(tmp_path / "whole"), packs), rel=1e-5)
    assert after == pytest.approx(by_peft(run, Path(run.folder.adapter), packs), rel=1e-5)
    assert abs(after - before) > 1e-4 * before
    assert found["loss"]["difference"] == after - before
    assert found["loss"]["tokens"] == spec.eval.supervised(range(3))  # type: ignore[attr-defined]
    shown = f"is lost; held-out loss {before:.4f} before compression, {after:.4f} after ({after - before:+.4f}, on "
    assert [line for line in lines if line.startswith("adapter of rank 2: ") and shown in line]
    assert shown in (Path(run.folder.adapter) / "README.md").read_text()


def test_it_is_measured_on_so_many_rows(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(run, export__rank=2)
    monkeypatch.setattr(export_shares, "LOSS_TOKENS", 1)
    found = export.export_run(spec, run.folder, STEP)["compressed"]["loss"]
    assert found["tokens"] == spec.eval.supervised([0])  # type: ignore[union-attr]


def test_what_cannot_be_measured_says_why(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert export.export_run(spec_of(run, 0, export__rank=2), run.folder, STEP)["compressed"]["loss"] == (
        "no rows are held out"
    )
    spec = spec_of(run, export__rank=2)
    with monkeypatch.context() as patch:
        patch.setattr(export_shares, "choose_attention", lambda *_: {}["/home/someone/model"])
        failed = export.export_run(spec, run.folder, STEP)
    assert (failed["ok"], failed["compressed"]["loss"]) == (True, "the model does not run here: '/home/someone/model'")
    card = (Path(run.folder.adapter) / "README.md").read_text()
    assert "of the change of the weights is lost; the held-out loss is not measured\n" in card
    assert "/home" not in card
    monkeypatch.setattr("olora_ray.model.load.free", lambda device: 1000)
    small = export.export_run(spec, run.folder, STEP)["compressed"]["loss"]
    assert small == "in float32 the model has 0.0 GiB, too large for the memory of one cpu"


def test_nothing_lost_is_nothing_to_measure(run: Run) -> None:
    found = export.export_run(spec_of(run, export__rank=8), run.folder, STEP)
    assert found["compressed"] == {"rank": 8, "lost": 0.0}
    assert Compressed(8, 0.0).in_words() == "0.00% of the change of the weights is lost"
    assert "Compressed" not in (Path(run.folder.adapter) / "README.md").read_text()


CHECKED = "Checked when it was exported: PEFT computes each layer's change within 1e-05 of its size; "


@pytest.mark.parametrize("merged", [True, False])
def test_the_card_says_what_the_checks_found(run: Run, merged: bool) -> None:
    export.export_run(spec_of(run, export__merged=merged), run.folder, STEP)
    card = (Path(run.folder.adapter) / "README.md").read_text()
    weights = "each merged weight is base + change within one rounding to bfloat16, and all others are the base's; "
    models = "the merged model and of the adapter in PEFT" if merged else "the adapter in PEFT"
    logits = f"the logits of {models} are those of the training but for rounding\n"
    assert f"{CHECKED}{weights if merged else ''}{logits}" in card


def test_a_card_of_an_export_that_is_not_right_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = export.new_adapter

    def scaled(adapter: Any, settings: Any, *rest: Any) -> Any:
        return real(adapter, settings.model_copy(update={"alpha": 2 * settings.alpha}), *rest)

    monkeypatch.setattr(export, "new_adapter", scaled)
    with pytest.raises(UserError, match="as PEFT computes it"):
        export.export_run(spec_of(run), run.folder, STEP)
    assert "exported: NOT right, see parity.json" in (Path(run.folder.adapter) / "README.md").read_text()


def test_an_old_adapter_stays_until_the_new_one_is_checked(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(run)
    export.export_run(spec, run.folder, STEP)
    folder = Path(run.folder.adapter)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "check_adapter", killed)
    with pytest.raises(KeyboardInterrupt):
        export.export_run(override_rank(spec), run.folder, STEP)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert not list(folder.parent.glob(".*")), "no leftovers"


def override_rank(spec: TrainSpec) -> TrainSpec:
    return replace(spec, config=override(spec.config, {"export.rank": 2}))
