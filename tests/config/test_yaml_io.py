"""What is valid YAML and no config is refused in one line, with the line in the file where there is one."""

import pytest

from olora_ray.common.errors import UserError
from olora_ray.config.load import build, override, parse_assignments, parse_yaml


def refusal(text: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "run.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    return message


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("2026-13-45", "'2026-13-45' is not valid; quote it"),
        ("010", "'010' is octal in YAML and means 8; remove the leading 0, or quote it"),
        ("-0_100", "'-0_100' is octal in YAML and means -64"),
        ("!!int x", "'x' is not valid"),
        ("!!bool x", "'x' is not valid"),
        ("9" * 4301, "...' is not valid"),
        ("99999999999999999999", "'99999999999999999999' is too large"),
        ("!!python/object:os.system x", "could not determine a constructor for the tag"),
        ("!!str [x]", "expected a scalar node, but found sequence"),
        ("*a", "found undefined alias 'a'"),
        ('"\\ud800"', "'\\ud800' is not valid"),
        ("a\x01b", "character #x0001"),
        ("{[x]: 1}", "a list or mapping cannot be a key"),
        ("{<<: 5}", "expected a mapping or list of mappings for merging"),
        ("[1", "but got '<stream end>'"),
    ],
    ids=lambda text: ascii(text)[:40],
)
def test_a_value_that_cannot_be_is_named_with_its_line(value: str, problem: str) -> None:
    message = refusal(f"run:\n  name: a\nmodel: {value}")
    assert message.startswith("run.yaml, line 3: not valid YAML: ")
    assert problem in message


def test_a_key_that_comes_twice_is_named_with_both_lines() -> None:
    text = "train: {lr: 1e-3, steps: 7}\nrun: {name: a}\n\ntrain: {epochs: 2}\n"
    assert (
        refusal(text) == "run.yaml, line 4: not valid YAML: duplicate key 'train', first in line 1"
    )
    assert "line 2: not valid YAML: duplicate key 'lr', first in line 1" in refusal(
        "train: {lr: 1,\n  'lr': 2}"
    )


LAUGHS = "a0: &a0 [x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
)


@pytest.mark.parametrize(
    "text", [LAUGHS, "a: &a [*a]", "a: &a {b: {c: [*a]}}", "a: " + "[" * 600 + "]" * 600]
)
def test_what_unfolds_without_end_is_refused_at_once(text: str) -> None:
    assert "more than 50,000 values" in refusal(text)


def test_aliases_and_merges_of_an_ordinary_size_are_read() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]\n"
    assert parse_yaml(text, "here") == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 1, "y": 3},
        "c": [{"x": 1, "y": 2}] * 2,
    }


@pytest.mark.parametrize("text", ["1:30", "-1:30", "1_0:30.5", "0x10", "0b11", "12:00:00"])
def test_numbers_of_yaml_that_nobody_means_are_texts(text: str) -> None:
    """`train.lr=1:30` was 90, `train.steps=0x10` was 16."""
    assert parse_assignments([f"run.name={text}"]) == {"run.name": text}
    with pytest.raises(UserError):
        override(
            build({"run": {"name": "a"}, "model": {"name": "m"}, "data": {"train": "x"}}),
            {"train.steps": text},
        )


@pytest.mark.parametrize("key", ["on", "yes", "1", "1e-4", "2026-01-01", "null", "~", ".inf", "="])
def test_keys_are_texts(key: str) -> None:
    assert parse_yaml(f"{key}: x", "here") == {key: "x"}


@pytest.mark.parametrize("word", [".=1", "data..x=1", "data.=1", ".x=1"])
def test_an_assignment_names_a_field(word: str) -> None:
    with pytest.raises(UserError):
        parse_assignments([word])
