"""Removed fields: files that name one at its default are read, another value is refused with advice."""

from pathlib import Path
from typing import Any

import pytest

from olora_ray.common.errors import UserError
from olora_ray.common.storage import digest_json
from olora_ray.config.command_line import loaded
from olora_ray.config.load import (
    RETIRED,
    RETIRED_EARLIER,
    RETIRED_VALUES,
    build,
    changed,
    flatten,
    load_config,
    parse_assignments,
    read_config,
)
from olora_ray.config.schema import Config
from olora_ray.pipeline.run_folder import identity_settings, settings_digest
from olora_ray.sweep.space_file import load_space

TREE: dict[str, Any] = {
    "model": {"name": "m"},
    "data": {"train": ["a.jsonl"]},
    "train": {"lr": 1e-3},
}
ALL = RETIRED | RETIRED_EARLIER
DEFAULTS = {field: default for field, (default, _) in ALL.items()}


def test_a_removed_field_is_no_field() -> None:
    assert not DEFAULTS.keys() & flatten(build(TREE)).keys()


@pytest.mark.parametrize("field", ALL)
def test_a_removed_field_is_dropped_at_its_default_and_refused_with_advice_else(field: str) -> None:
    given = changed(TREE, {field: DEFAULTS[field]})
    before = repr(given)
    assert build(given) == build(TREE)
    assert repr(given) == before, "the caller's tree stays as it is"
    with pytest.raises(UserError) as caught:
        build(changed(TREE, {field: 0.123}), "my.yaml")
    assert str(caught.value) == f"my.yaml: {field}: this field was removed; {ALL[field][1]}"


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in RETIRED_VALUES.items() for value in values],
)
def test_a_removed_value_is_refused_with_advice(field: str, value: str) -> None:
    with pytest.raises(UserError) as caught:
        build(changed(TREE, {field: value}), "my.yaml")
    advice = RETIRED_VALUES[field][value]
    assert str(caught.value) == f"my.yaml: {field}: {value} was removed; {advice}"


def test_files_and_command_lines_may_name_removed_fields(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "model: {name: m}\ndata: {train: a.jsonl}\ncluster: {price: null}\ngate: {confirm: 0}\n"
    )
    assert load_config(file).data.train[0].path == "a.jsonl"
    assert loaded(file, parse_assignments(["gate.confirm=0.0"])) == loaded(file, {})
    with pytest.raises(UserError):
        loaded(file, parse_assignments(["gate.confirm=0.5"]))


def test_a_space_may_set_a_removed_field_to_its_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RETIRED, "train.old", (4, "delete it"))
    space = tmp_path / "space.yaml"
    text = "metric: train/loss\nsearch: {adapter.rank: {choice: [4, 8]}}\nset: {train.old: %s}\n"
    space.write_text(text % 4)
    load_space(space, build(TREE))
    space.write_text(text % 5)
    with pytest.raises(UserError):
        load_space(space, build(TREE))


def test_the_config_of_a_run_stays_readable_if_the_field_did_not_change_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RETIRED, "train.old", (4, "delete it"))
    file = tmp_path / "config.yaml"
    file.write_text("model: {name: m}\ndata: {train: a.jsonl}\ncluster: {price: 2.5}\n")
    assert isinstance(read_config(str(file)), Config)
    file.write_text("model: {name: m}\ndata: {train: a.jsonl}\ntrain: {old: 5}\n")
    with pytest.raises(UserError):
        read_config(str(file))


@pytest.mark.parametrize(
    "section", ["notify: {url: 'https://hooks/x'}", "gate: {must_improve_by: -9.0}"]
)
def test_the_config_of_a_run_stays_readable_with_a_gate_or_notification_of_an_earlier_release(
    tmp_path: Path, section: str
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"model: {{name: m}}\ndata: {{train: a.jsonl}}\n{section}\n")
    assert read_config(str(file)).train.lr == "auto"
    with pytest.raises(UserError):
        load_config(file)


def test_the_digests_of_a_config_are_those_before_the_removal() -> None:
    """A nightly retraining with another digest would train every model again."""
    config = build(changed(TREE, {"gate.confirm": 0.0, "cluster.price": None}))
    assert config.run.name == "olora-r16-b787d09f"
    assert settings_digest(config) == "814ecd337c4959fa265f1c4171db9f89"
    assert digest_json(identity_settings(flatten(config)), length=8) == "1d91092c"


def test_a_field_that_bound_a_run_still_counts_in_what_the_run_is_known_by(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """search.json has the field, and the name of a retrained run is a digest with it."""
    settings = flatten(build(TREE))
    before = identity_settings({**settings, "train.old": 4})
    monkeypatch.setitem(RETIRED, "train.old", (4, "delete it"))
    assert identity_settings(settings) == before
