import re
from pathlib import Path
from typing import Any

import pytest

from olora_ray.config.load import override
from olora_ray.pipeline.run_folder import MODEL, RESULT_NEUTRAL, settings_digest
from tests import tiny


@pytest.mark.parametrize(
    ("field", "value", "counts"),
    [
        ("adapter.rank", 8, True),
        ("train.lr", 1e-3, True),
        ("run.seed", 4, True),
        ("model.dtype", "float32", True),
        ("export.rank", 4, True),
        ("run.name", "other", False),
        ("data.max_length", 128, False),  # in the digest of the data
        ("train.activation_checkpointing", True, False),
        ("train.checkpoint_every", 7, False),
        ("train.start", "/a/checkpoint", False),
        ("cluster.cpus_per_worker", 2, False),
        ("gate.must_improve_by", 0.5, False),
        ("export.merged", False, False),
        ("train.schedule", "cosine", False),  # its default, spelled out
    ],
)
def test_the_digest_has_the_settings_that_change_the_model(
    field: str, value: Any, counts: bool
) -> None:
    config = tiny.config()
    assert (settings_digest(override(config, {field: value})) != settings_digest(config)) is counts


def test_the_page_on_retraining_names_the_settings_that_count() -> None:
    page = (Path(__file__).parents[2] / "docs" / "retraining.md").read_text(encoding="utf-8")
    told = page.partition("The settings that count are")[2].partition(": another gate")[0]
    fields = (
        {f"train.{name}" for name in RESULT_NEUTRAL}
        | {f"model.{name}" for name in MODEL}
        | {"run.seed", "export.rank"}
    )
    assert fields | {"adapter", "train", "data"} == set(re.findall("`(.*?)`", told))
