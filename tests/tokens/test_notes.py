"""Unusual rows are counted, and reported once."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from olora_ray.data.tokenizer_spec import TokenizerSpec
from olora_ray.tokens.manifest import lines
from olora_ray.tokens.prepare import prepare
from olora_ray.tokens.preview import describe
from tests.data.test_chat_template import ALL, conversation
from tests.said import said
from tests.tokens import helpers


def write(folder: Path, *chats: list[str]) -> Path:
    return helpers.write_jsonl(
        folder / "a.jsonl", [{"messages": conversation(*turns)} for turns in chats]
    )


LONG = [f"turn {number}" for number in range(10)]
SPLIT = (
    "2 of 3 chats were split by the chat template, one example per answer, into 3.2 times the tokens; to"
    " train only the last answer of a chat, set data.last_turn_only: true"
)


def test_chats_that_a_template_splits(tmp_path: Path) -> None:
    # Qwen3 drops the reasoning of earlier turns, so 5 answers become 5 examples with the whole chat before each.
    spec = helpers.spec(ALL["qwen3"])
    path = write(tmp_path, LONG, LONG, ["hi", "one"])
    config = helpers.config(tmp_path / "runs", path, max_length=1000)
    for when in ("", " (built earlier)"):
        with said() as printed:
            store = prepare(config, spec, "train")
        assert [line for line in printed if "split" in line] == [f"tokens: train: {SPLIT}"]
        assert any(line.endswith(when) for line in printed)
    assert store.manifest.examples == 11
    with said() as printed:
        describe(config, spec)
    assert f"of the rows read, {SPLIT}" in printed


@pytest.mark.parametrize(
    ("end", "answer", "expected"),
    [("", "x", ["single", "unended"]), ("", "xy", ["unended"]), ("{{ eos_token }}", "x", [])],
)
def test_single_tokens_and_answers_without_an_end(
    end: str, answer: str, expected: list[str], tmp_path: Path
) -> None:
    template = f"{{% for m in messages %}}{{{{ m.content }}}}{end}\n{{% endfor %}}"
    path = write(tmp_path, ["hi", answer])
    spec = helpers.spec(template)
    inner = json.loads(spec.json)
    if not end:  # the end token is put after an answer without one, unless the tokenizer does not know it in a text
        inner["added_tokens"] = [
            token for token in inner["added_tokens"] if token["content"] != "</s>"
        ]
    spec = replace(spec, json=json.dumps(inner))
    store = prepare(helpers.config(tmp_path / "runs", path), spec, "train")
    found = store.manifest.notes
    assert found == {"chats": 1, **dict.fromkeys(expected, 1)}
    words = {
        "single": "rows with a single supervised token: 1",
        "unended": "does not end with an end token: 1",
    }
    assert [words[name] in line for name, line in zip(expected, lines(found), strict=True)] == [
        True
    ] * len(expected)


def test_reasoning_for_which_the_template_has_no_place(
    tmp_path: Path, tiny_spec: TokenizerSpec
) -> None:
    chats = [conversation("q", "a"), conversation("q", "a")]
    chats[0][-1]["reasoning_content"] = "abc"
    path = helpers.write_jsonl(tmp_path / "a.jsonl", [{"messages": chat} for chat in chats])
    with said() as printed:
        describe(helpers.config(tmp_path / "runs", path), tiny_spec)
    (line,) = (line for line in printed if "reasoning" in line)
    assert "trained as <think>...</think> before the answer: 1 (" in line
