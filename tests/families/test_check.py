"""The check finds what it is there for: each error is planted once in a family that is right without it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from olora_ray.adapter import layer, merge
from olora_ray.cluster import resume
from olora_ray.common.errors import UserError
from olora_ray.model import attention
from olora_ray.pipeline.export import export_run
from olora_ray.train.loss import SelfTest, SupervisedLoss
from tests.families import check as check_module
from tests.families import table
from tests.families.check import check
from tests.families.row import Row
from tests.families.variants import ALL, DENSE, variant

LLAMA = ALL["llama"]


def test_attention_over_borders_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = attention.segment_attention

    def over_borders(module: Any, query: Any, *rest: Any, cu_seq_lens_q: Any = None, **others: Any) -> Any:
        return old(module, query, *rest, cu_seq_lens_q=torch.tensor([0, query.shape[2]]), **others)

    monkeypatch.setattr(attention, "segment_attention", over_borders)
    # The self-test would take another attention.
    monkeypatch.setattr(resume, "choose_attention", lambda *_: SelfTest("segments"))
    row = check(LLAMA, "fp32", tmp_path)
    assert not row.right
    assert row.refused or "packed" in row.verdict


def test_a_loss_of_scaled_logits_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = SupervisedLoss.each
    monkeypatch.setattr(SupervisedLoss, "each", lambda self, batch: old(self, batch) * 1.0001)
    row = check(LLAMA, "fp32", tmp_path)
    assert not row.right
    assert row.refused or "loss" in row.verdict


def test_wrong_gradients_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = layer._LowRank.backward

    def backward(ctx: Any, *grads: Any) -> Any:
        y, x, da, db, *rest = old(ctx, *grads)
        return y, x, da * 1.01, db, *rest

    monkeypatch.setattr(layer._LowRank, "backward", staticmethod(backward))
    row = check(LLAMA, "fp32", tmp_path)
    assert row.verdict.startswith("WRONG: gradients")


def test_an_adapter_without_a_gradient_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = layer.AdaptedLinear.forward

    def forward(self: Any, x: Any) -> Any:
        return self.base(x) if self.da.shape[1] == 96 else old(self, x)

    monkeypatch.setattr(layer.AdaptedLinear, "forward", forward)
    row = check(LLAMA, "fp32", tmp_path)
    assert not row.right
    assert row.refused or len(row.still) == 2


def test_a_wrong_export_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the product's own comparison says nothing."""

    old = merge.merge

    def merged(base: Path, folder: Path, share: Any, adapter: Any, scale: float, *rest: Any) -> Any:
        return old(base, folder, share, adapter, scale * 1.02, *rest)

    def blind(*arguments: Any) -> dict[str, Any]:
        with pytest.raises(UserError):
            export_run(*arguments)
        return {"ok": True, "problems": []}

    monkeypatch.setattr(merge, "merge", merged)
    monkeypatch.setattr(check_module, "export_run", blind)
    row = check(LLAMA, "fp32", tmp_path)
    assert row.verdict.startswith("WRONG: export")


def test_a_refusal_before_the_first_step_is_none_of_an_error(tmp_path: Path) -> None:
    small = variant("small", DENSE, kind="llama", num_key_value_heads=1, head_dim=2)
    row = check(small, "fp32", tmp_path)
    assert row.refused
    assert "adapter.rank=4 is too large for model.layers.0" in row.verdict
    assert str(tmp_path) not in row.verdict


@pytest.mark.parametrize("error", [UserError("export: no"), ValueError("two\nlines")])
def test_an_end_after_training_is_not_taken_for_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def failing(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(check_module, "export_run", failing)
    row = check(LLAMA, "fp32", tmp_path)
    assert not row.right
    assert not row.refused
    assert row.verdict in ("refused after step 4: export: no", "traceback at export: ValueError: two")


def test_differences_are_shown_without_their_digits() -> None:
    assert [table.shown(each) for each in (None, 0.0, 9.4e-8, 0.5, 1.2, float("nan"))] == [
        "–",
        "0",
        "< 1e-7",
        "< 1e0",
        "< 1e1",
        "nan",
    ]


def test_the_table_has_a_line_for_each_row() -> None:
    rows = [Row("llama", "fp32", stage="end"), Row("arcee", "fp32", end="refused: a | b", stage="open")]
    assert table.summary(rows) == "1 of 2 right to the end, 1 refused before the first step"
    assert table.table(rows).splitlines()[-1].endswith("| refused: a \\| b |")
    assert table.of_review(rows) == rows[:1]
