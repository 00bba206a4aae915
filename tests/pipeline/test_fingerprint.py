import re
from pathlib import Path
from typing import Any

import pytest

from olora_ray.config.load import override
from olora_ray.pipeline.run_folder import MODEL, NEUTRAL, Fingerprint, settings_digest
from tests import tiny


@pytest.mark.parametrize(
    ("field", "value", "counts"),
    [
        ("adapter.rank", 8, True),
        ("train.lr", 1e-3, True),
        ("train.eval_every", 7, True),
        ("run.seed", 4, True),
        ("model.dtype", "float32", True),
        ("export.rank", 4, True),
        ("run.name", "other", False),
        ("run.storage", "/elsewhere", False),
        ("data.max_length", 128, False),  # in the digest of the data
        ("train.keep", 5, False),
        ("train.activation_checkpointing", True, False),
        ("train.log_every", 1, False),
        ("train.checkpoint_every", 7, False),
        ("train.start", "/a/checkpoint", False),
        ("cluster.cpus_per_worker", 2, False),
        ("tracking.experiment", "other", False),
        ("gate.must_improve_by", 0.5, False),
        ("notify.command", "cat", False),
        ("export.merged", False, False),
        ("train.schedule", "cosine", False),  # its default, spelled out
    ],
)
def test_the_digest_has_the_settings_that_change_the_model(field: str, value: Any, counts: bool) -> None:
    config = tiny.config()
    assert (settings_digest(override(config, {field: value})) != settings_digest(config)) is counts


def test_the_page_on_retraining_names_the_settings_that_count() -> None:
    page = (Path(__file__).parents[2] / "docs" / "retraining.md").read_text(encoding="utf-8")
    told = page.partition("The settings that count are")[2].partition(": another gate")[0]
    fields = {f"train.{name}" for name in NEUTRAL} | {f"model.{name}" for name in MODEL} | {"run.seed", "export.rank"}
    assert fields | {"adapter", "train", "data"} == set(re.findall("`(.*?)`", told))


def test_it_goes_through_tags() -> None:
    found = Fingerprint("base", "data", "held", "settings")
    assert Fingerprint.from_tags({**found.tags(), "olora.rank": "4"}) == found
    assert Fingerprint.from_tags({"olora.rank": "4"}) != found


def test_what_has_changed_has_a_name() -> None:
    old = Fingerprint("base", "data", "held", "settings")
    assert old.changes(old) == []
    assert Fingerprint("other", "data", "held", "other").changes(old) == ["base model", "settings"]
