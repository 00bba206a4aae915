"""The check finds the errors for which it exists: each is planted once in a family that is right without it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from olora_ray.adapter import layer
from olora_ray.cluster import start
from olora_ray.common.errors import UserError
from olora_ray.model import attention
from olora_ray.pipeline import merge
from olora_ray.train.loss import SelfTest, SupervisedLoss
from tests.families import check as check_module
from tests.families.check import check
from tests.families.row import Row
from tests.families.variants import ALL

LLAMA = ALL["llama"]


# Owner and name of a function, and a function that makes it wrong.
Plant = tuple[Any, str, Callable[[Any], Any]]


def over_borders(attend: Any) -> Any:
    def wrong(module: Any, query: Any, *rest: Any, cu_seq_lens_q: Any = None, **others: Any) -> Any:
        return attend(
            module, query, *rest, cu_seq_lens_q=torch.tensor([0, query.shape[2]]), **others
        )

    return wrong


def steeper(backward: Any) -> Any:
    def wrong(ctx: Any, *grads: Any) -> Any:
        *rest, da, db = backward(ctx, *grads)
        return *rest, da * 1.01, db

    return staticmethod(wrong)


def without_gradient(forward: Any) -> Any:
    return lambda self, x: self.base(x) if self.da.shape[1] == 96 else forward(self, x)


def at_another_scale(merged: Any) -> Any:
    def wrong(base: Path, folder: Path, share: Any, adapter: Any, scale: float, *rest: Any) -> Any:
        return merged(base, folder, share, adapter, scale * 1.02, *rest)

    return wrong


def blind(export: Any) -> Any:
    """Turn off the product's own comparison."""

    def wrong(*arguments: Any) -> dict[str, Any]:
        with pytest.raises(UserError):
            export(*arguments)
        return {"ok": True, "problems": []}

    return wrong


# Without this the self-test would choose another attention.
ATTENTION: list[Plant] = [
    (attention, "segment_attention", over_borders),
    (start, "choose_attention", lambda _: lambda *_: SelfTest("segments")),
]
LOSS: Plant = (SupervisedLoss, "each", lambda each: lambda self, batch: each(self, batch) * 1.0001)
EXPORT: list[Plant] = [(merge, "merge", at_another_scale), (check_module, "export_run", blind)]


@pytest.mark.usefixtures("node")  # a result of a planted model must not be kept for the next test
@pytest.mark.parametrize(
    ("plants", "told"),
    [
        (ATTENTION, lambda row: row.refused or "packed" in row.verdict),
        ([LOSS], lambda row: row.refused or "loss" in row.verdict),
        (
            [(layer._Adapted, "backward", steeper)],
            lambda row: row.refused or row.verdict.startswith("WRONG: gradients"),
        ),
        (
            [(layer.AdaptedLinear, "forward", without_gradient)],
            lambda row: row.refused or len(row.missed or row.still) == 2,
        ),
        (EXPORT, lambda row: row.verdict.startswith("WRONG: export")),
    ],
    ids=["attention over borders", "loss", "gradients", "no gradient", "export"],
)
def test_a_planted_error_is_found(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    plants: list[Plant],
    told: Callable[[Row], bool],
) -> None:
    for owner, name, wrong in plants:
        monkeypatch.setattr(owner, name, wrong(getattr(owner, name)))
    row = check(LLAMA, "fp32", tmp_path)
    assert not row.right
    assert told(row)


@pytest.mark.parametrize("error", [UserError("export: no"), ValueError("two\nlines")])
def test_an_end_after_training_is_not_taken_for_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(check_module, "export_run", Mock(side_effect=error))
    row = check(LLAMA, "fp32", tmp_path)
    assert not row.right
    assert not row.refused
    assert row.verdict in (
        "refused after step 4: export: no",
        "traceback at export: ValueError: two",
    )
