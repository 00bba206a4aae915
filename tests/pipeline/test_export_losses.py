"""What an export changes is measured on held-out rows and told on the card: compression, a quantised base."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from olora_ray.cluster.spec import TrainSpec
from olora_ray.config.load import override
from olora_ray.pipeline import export
from olora_ray.train.parallel import load_frozen
from tests import tiny
from tests.packed import unpack
from tests.pipeline.test_export_shares import STEP, Run
from tests.refused import refused
from tests.said import said

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def spec_of(run: Run, packs: int = 3, **changes: Any) -> TrainSpec:
    """In float32, with held-out rows."""
    fields = {name.replace("__", "."): value for name, value in changes.items()}
    held_out: Any = tiny.store(packs, seed=4) if packs else None
    return replace(
        run.spec,
        config=override(
            run.config, {"model.dtype": "float32", "data.eval_fraction": 0.1, **fields}
        ),
        eval=held_out,
    )


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
    packs = [spec.eval[number] for number in range(3)]
    before, after = found["loss"]["before"], found["loss"]["after"]
    assert before == pytest.approx(
        by_peft(run, run.case.write_adapter(tmp_path / "whole"), packs), rel=1e-5
    )
    assert after == pytest.approx(by_peft(run, Path(run.folder.adapter), packs), rel=1e-5)
    assert abs(after - before) > 1e-4 * before
    assert found["loss"]["difference"] == after - before
    assert found["loss"]["tokens"] == spec.eval.counts(range(3)).supervised  # type: ignore[attr-defined]
    shown = f"is lost; held-out loss {before:.4f} before compression, {after:.4f} after ({after - before:+.4f}, on "
    assert [line for line in lines if line.startswith("adapter of rank 2: ") and shown in line]
    assert shown in (Path(run.folder.adapter) / "README.md").read_text()
    assert (found["rank"], 0.1 < found["lost"] < 1) == (2, True)
    config = json.loads((Path(run.folder.adapter) / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 4)


CHECKED = "Checks of the export: PEFT computes each layer's change with a relative error of at most 1e-05; "


@pytest.mark.parametrize("merged", [True, False])
def test_the_card_says_what_the_checks_found_and_the_template_is_that_of_the_training(
    run: Run, merged: bool
) -> None:
    own = "{% for message in messages %}{{ message.content + eos_token }}{% endfor %}"
    export.export_run(replace(spec_of(run, export__merged=merged), template=own), run.folder, STEP)
    for folder in (run.folder.adapter, *([run.folder.merged] if merged else [])):
        assert AutoTokenizer.from_pretrained(folder).chat_template == own
    card = (Path(run.folder.adapter) / "README.md").read_text()
    assert CHECKED in card
    assert ("each merged weight is base + change, rounded to bfloat16" in card) == merged


def test_a_card_of_an_export_that_is_not_right_says_so(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = export.new_adapter

    def scaled(adapter: Any, settings: Any, *rest: Any) -> Any:
        return real(adapter, settings.model_copy(update={"alpha": 2 * settings.alpha}), *rest)

    monkeypatch.setattr(export, "new_adapter", scaled)
    with refused("PEFT computes the change of"):
        export.export_run(spec_of(run), run.folder, STEP)
    assert "export: NOT right" in (Path(run.folder.adapter) / "README.md").read_text()


def test_an_old_adapter_stays_until_the_new_one_is_checked(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(run)
    export.export_run(spec, run.folder, STEP)
    folder = Path(run.folder.adapter)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "check_adapter", killed)
    with pytest.raises(KeyboardInterrupt):
        export.export_run(spec_of(run, export__rank=2), run.folder, STEP)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert not list(folder.parent.glob(".*")), "no leftovers"


def test_the_loss_on_both_bases_is_measured_and_told(run: Run, tmp_path: Path) -> None:
    spec = spec_of(run, model__quantization="fp8")
    with said() as lines:
        measured = export.export_run(spec, run.folder, STEP)
    found, held_out = measured["quantised"], spec.eval
    packs = [held_out[number] for number in range(3)]
    # The adapter as PEFT reads it, on the weights that were trained on, and on the original ones.
    unpack(load_frozen(run.case.base, spec.config.model, CPU)).save_pretrained(
        tmp_path / "unpacked"
    )
    on_both = [
        by_peft(run, Path(run.folder.adapter), packs, base)
        for base in (tmp_path / "unpacked", run.case.base)
    ]
    assert [found["loss"]["before"], found["loss"]["after"]] == pytest.approx(on_both, rel=1e-5)
    assert abs(found["loss"]["difference"]) > 1e-4
    text = f"trained on the base model as fp8, exported for the original weights: held-out loss {on_both[0]:.4f} on the"
    assert text in (Path(run.folder.adapter) / "README.md").read_text()
    assert [line for line in lines if line.startswith(f"adapter: {text}")]


def test_the_merged_model_is_that_of_an_unquantised_training(run: Run) -> None:
    export.export_run(spec_of(run), run.folder, STEP)
    before = run.merged()
    measured = export.export_run(spec_of(run, model__quantization="fp8"), run.folder, STEP)
    assert measured["ok"] is True
    assert measured["merged"]["weights"]["error"] <= 1
    after = run.merged()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
