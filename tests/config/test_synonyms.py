"""Names that users of Hugging Face's libraries know work in files and on the command line."""

from pathlib import Path
from typing import Any

import pytest

from olora_ray.common.errors import UserError
from olora_ray.config.command_line import loaded
from olora_ray.config.load import (
    SYNONYMS,
    at,
    build,
    changed,
    flatten,
    load_config,
    meant,
    override,
    parse_assignments,
)
from tests.said import said

TREE: dict[str, Any] = {"model": {"name": "m"}, "data": {"train": ["a.jsonl"]}}
OTHER: dict[str, Any] = {
    "model.torch_dtype": "float32",
    "model.attn_implementation": "eager",
    "model.model_revision": "main",
    "model.model_name_or_path": "m",
    "adapter.target_modules": ["q_proj"],
    "adapter.lora_target_modules": ["q_proj"],
    "adapter.lora_dropout": 0.1,
    "adapter.use_rslora": True,
    "train.gradient_checkpointing": True,
    "train.warmup_ratio": 0.1,
    "tracking.tracking_uri": "http://mlflow:5000",
    "tracking.experiment_name": "e",
    "registry.registered_model_name": "support",
}
"""A value for each name whose values are no numbers like 8."""


@pytest.mark.parametrize("name", SYNONYMS)
def test_a_synonym_is_the_field(name: str) -> None:
    field, value = SYNONYMS[name], OTHER.get(name, 8)
    tree = TREE
    if field == "model.name":
        tree = {**TREE, "model": {}}
    with said() as lines:
        config = build(changed(tree, {name: value}))
    assert f"{name} is read as {field}" in lines
    assert config == build(changed(TREE, {field: value}))
    assert config.run.name == build(changed(TREE, {field: value})).run.name
    assert at(config, field) == value
    assert parse_assignments([f"{name}={value}"]).keys() == {field}
    assert name not in flatten(config)
    if name != "train.warmup_ratio":
        assert meant(name.partition(".")[2]) == field, "the advice for the bare name"


def test_a_field_that_is_set_under_two_names_is_an_error() -> None:
    for names in (("train.lr", "train.learning_rate"), ("adapter.r", "adapter.lora_r")):
        with pytest.raises(UserError, match=f"{SYNONYMS[names[1]]}, which is set too"):
            build(changed(TREE, dict.fromkeys(names, 8)))
        for given in (names, names[::-1]):
            with pytest.raises(UserError):
                parse_assignments([f"{name}=8" for name in given])


def test_the_command_line_overrides_the_file_whatever_the_names_are(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "model: {name: m}\ndata: {train: a.jsonl}\ntrain: {learning_rate: 0.5, max_steps: 9}\n"
    )
    assert load_config(file).train.lr == 0.5
    assert loaded(file, parse_assignments(["train.lr=0.25"])).train.lr == 0.25
    changes = parse_assignments(["train.learning_rate=0.25", "train.num_train_epochs=3"])
    with said() as lines:
        train = loaded(file, changes).train
    assert (train.lr, train.steps, train.epochs) == (0.25, None, 3)
    assert any("train.epochs overrides train.steps=9" in line for line in lines)


@pytest.mark.parametrize(
    "name", ["per_device_train_batch_size", "train_batch_size", "max_seq_length"]
)
def test_a_name_that_means_something_else_is_refused_with_advice(name: str) -> None:
    with pytest.raises(UserError, match=f"train.{name}: unknown field; use {meant(name)}"):
        build(changed(TREE, {f"train.{name}": 8}))


def test_a_run_keeps_the_field_s_own_name() -> None:
    config = build(changed(TREE, {"train.learning_rate": 0.5}))
    assert override(config, {}) == config
    with pytest.raises(UserError):
        override(config, {"train.learning_rate": 0.1})
