import re
from pathlib import Path
from typing import Any

import pytest

from olora_ray.config.load import override
from olora_ray.pipeline.run_folder import MODEL, NEUTRAL, Fingerprint, settings_digest
from tests import tiny


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("adapter.rank", 8),
        ("train.lr", 1e-3),
        ("train.eval_every", 7),
        ("run.seed", 4),
        ("model.dtype", "float32"),
        ("export.rank", 4),
    ],
)
def test_settings_that_change_the_model_change_the_digest(field: str, value: Any) -> None:
    config = tiny.config()
    assert settings_digest(override(config, {field: value})) != settings_digest(config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run.name", "other"),
        ("run.storage", "/elsewhere"),
        ("data.max_length", 128),  # in the digest of the data
        ("train.keep", 5),
        ("train.activation_checkpointing", True),
        ("train.log_every", 1),
        ("train.checkpoint_every", 7),
        ("train.start", "/a/checkpoint"),
        ("cluster.cpus_per_worker", 2),
        ("tracking.experiment", "other"),
        ("gate.must_improve_by", 0.5),
        ("notify.command", "cat"),
        ("export.merged", False),
        ("train.schedule", "cosine"),  # its default, spelled out
    ],
)
def test_settings_that_do_not_change_the_model_do_not(field: str, value: Any) -> None:
    config = tiny.config()
    assert settings_digest(override(config, {field: value})) == settings_digest(config)


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
