"""What is valid YAML and no config is refused in one line that names the line, within a moment."""

import tracemalloc

import pytest

from olora_ray.common.errors import UserError
from olora_ray.config.load import changed, parse_assignments, parse_yaml


def refusal(text: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "run.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    return message


def levels(count: int, line: str) -> str:
    """Each level names the one above nine times."""
    return "a0: &a0 {x: 1}\n" + "".join(
        line.format(name=f"a{level}", items=", ".join([f"*a{level - 1}"] * 9)) + "\n" for level in range(1, count)
    )


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("2026-13-45", "'2026-13-45' is no date or time; quote it if it is a text"),
        ("0b_", "'0b_' is no whole number"),
        ("010", "'010' would be 8: with a 0 in front YAML counts in eights; write it without, or quote it"),
        ("-0_100", "'-0_100' would be -64"),
        ("!!int x", "'x' is no whole number"),
        ("!!int", "'' is no whole number"),
        ("!!float x", "'x' is no number"),
        ("!!bool x", "'x' is no boolean"),
        ("!!timestamp z", "'z' is no date or time"),
        ("9" * 4301, "is too long for a whole number"),
        ("0x" + "f" * 5000, "is too long for a whole number"),
        ("1:" * 50_000 + "1", "is too long for a whole number"),
        ("99999999999999999999", "'99999999999999999999' is too large for a whole number"),
        ("!!set {x}", "the tag or value 'set' is not known"),
        ("!!python/object:os.system x", "the tag or value 'python/object:os.system' is not known"),
        ("!!str [x]", "expected a scalar node, but found sequence"),
        ("&a [*a]", "*a stands inside of what it names"),
        ("&a {b: {c: [*a]}}", "*a stands inside of what it names"),
        ("*a", "found undefined alias 'a'"),
        ("[" * 600, "more than 50 levels of lists and mappings"),
        ("[" * 600 + "]" * 600, "more than 50 levels of lists and mappings"),
        ("{a: " * 600, "more than 50 levels of lists and mappings"),
        ('"\\ud800"', "'\\ud800' has a character that is no text in it"),
        ('"a\\0b"', "'a\\x00b' has a character that is no text in it"),
        ("a\x01b", "the character #x0001 is not allowed"),
        ("{'': 1}", "an empty key"),
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
    assert refusal(text) == "run.yaml, line 4: not valid YAML: the key 'train' stands in line 1 already"
    assert "line 2: not valid YAML: the key 'lr' stands in line 1 already" in refusal("train: {lr: 1,\n  'lr': 2}")


@pytest.mark.parametrize(
    "line", ["{name}: &{name} [{items}]", "{name}: &{name} {{<<: [{items}]}}", "{name}: &{name} {{x: [{items}]}}"]
)
@pytest.mark.parametrize("count", [9, 30])
def test_aliases_that_unfold_without_end_are_refused_before_they_do(line: str, count: int) -> None:
    tracemalloc.start()
    message = refusal(levels(count, line))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "more than 50,000 values, aliases unfolded" in message
    assert peak < 50e6


def test_aliases_and_merges_of_an_ordinary_size_are_read() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]\n"
    assert parse_yaml(text, "here") == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": [{"x": 1, "y": 2}] * 2}


def test_a_text_that_is_far_too_long_is_not_read() -> None:
    assert refusal("# comment\n" * 300_000) == "run.yaml: 3,000,000 characters, more than 2,000,000: not a config"


@pytest.mark.parametrize(
    ("text", "number"), [("007", 7), ("0", 0), ("-00", 0), ("0x10", 16), ("10", 10), ("0.10", 0.1)]
)
def test_numbers_that_everybody_reads_alike_are_read(text: str, number: float) -> None:
    assert parse_yaml(f"a: {text}", "here") == {"a": number}


@pytest.mark.parametrize("key", ["on", "yes", "1", "1e-4", "2026-01-01", "null", "~", ".inf", "="])
def test_keys_are_texts(key: str) -> None:
    assert parse_yaml(f"{key}: x", "here") == {key: "x"}


@pytest.mark.parametrize("word", [".=1", "data..x=1", "data.=1", ".x=1"])
def test_an_assignment_names_a_field(word: str) -> None:
    with pytest.raises(UserError, match=r"expected section\.field=value"):
        parse_assignments([word])


@pytest.mark.parametrize("place", ["²", "9" * 5000, "-1", "1"])
def test_a_place_in_a_list_is_a_number_within_it(place: str) -> None:
    with pytest.raises(UserError, match="the list has 1 entries"):
        changed({"data": {"train": [{}]}}, {f"data.train.{place}": {}})
    with pytest.raises(UserError, match="has no fields to set"):
        changed({"data": {"train": [{}]}}, {f"data.train.{place}.path": "x"})
