"""What a source may say about its rows: templates and paths, roles, labels, a system message."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from olora_ray.common.errors import UserError
from olora_ray.data.formats import to_example
from olora_ray.data.formats.format import Rejected
from olora_ray.tokens.prepare import plan_here, prepare
from olora_ray.tokens.preview import describe
from tests import tiny
from tests.tokens import helpers

WMT = [{"translation": {"de": "Haus", "en": "house"}}] * 12
SQUAD = [
    {
        "id": "5733be284776f41900661182",
        "title": "Sky",
        "context": "The sky is blue.",
        "question": "Which colour has it?",
        "answers": {"text": ["blue", "it is blue"], "answer_start": [9, 0]},
    }
] * 12
IMDB = [{"text": f"film {n}", "label": n % 2} for n in range(12)]
BOOLQ = [{"question": "is it", "answer": True, "passage": "It is."}] * 12
CUSTOMER = [{"role": "Customer", "content": "late"}, {"role": "Agent", "content": "sorry"}]
SPEAKER = [{"speaker": "Kunde", "text": "late"}, {"speaker": "Bot 2", "text": "sorry"}]
CLASSIFY = {"instruction": "text", "output": "label"}
NAMES = ["negative", "positive"]


def config(folder: Path, rows: list[Any], kind: str = "jsonl", **source: Any) -> Any:
    path = folder / f"a.{kind}"
    path.parent.mkdir(exist_ok=True)
    table = pa.Table.from_pylist(rows)
    if kind == "jsonl":
        helpers.write_jsonl(path, rows)
    elif kind == "parquet":
        parquet.write_table(table, path)
    else:
        names = table.column_names
        cells = [[str(row[name]) for name in names] for row in rows]
        path.write_text("".join(f"{','.join(line)}\n" for line in [names, *cells]))
    return helpers.config(folder / "runs", {"path": str(path), **source}, max_length=512)


def spoken(config: Any) -> tuple[str, str]:
    """Return the prompt and the supervised text of the first row, as a dry run shows them."""
    first = describe(tiny.read_as(config), helpers.spec()).examples[0]
    prompt = helpers.decode(first.input_ids[~first.mask])
    return prompt, helpers.decode(first.input_ids[first.mask])


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("rows", "fields", "asked", "answer"),
    [
        (
            WMT,
            {"instruction": "To German: {translation.en}", "output": "translation.de"},
            "To German: house",
            "Haus",
        ),
        (SQUAD, {"output": "answers.text.0"}, "Which colour has it?\n\nThe sky is blue.", "blue"),
        (
            SQUAD,
            {"instruction": "{{{title}}} {context}", "output": "{answers.answer_start.0}"},
            "{Sky} The sky is blue.<|im_end|>",
            "9",
        ),
        (BOOLQ, {}, "is it", "true"),
        (
            [{"a.b": "q", "a": {"b": "no"}, "n": 1.5}] * 12,
            {"prompt": "a.b", "completion": "n"},
            "q",
            "1.5",
        ),
    ],
)
def test_a_field_is_a_column_a_path_or_a_template(
    kind: str, rows: Any, fields: Any, asked: str, answer: str, tmp_path: Path
) -> None:
    fields = fields | {"id": "none", "title": "none", "passage": "none", "a": "none"}
    if "{title}" in fields.get("instruction", ""):
        fields["question"] = "none"
    given = config(tmp_path, rows, kind, fields=fields)
    prompt, supervised = spoken(given)
    assert f"user\n{asked}" in prompt
    assert supervised == f"{answer}<|im_end|>"
    # The preparation reads the same, of Parquet only the columns that are named.
    texts = helpers.texts(prepare(given, helpers.spec(), "train"))
    assert f"{prompt.rstrip()}\n{supervised}" in "".join(texts)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"output": "answers.texts.0"}, "'answers' has no 'texts': it has text, answer_start"),
        ({"output": "answers.text.7"}, "'answers.text' has no '7': it is a list of 2"),
        ({"output": "{answers.text.0.x}"}, "'answers.text.0' has no 'x': it is text"),
        (
            {"output": "{reply}"},
            "field 'reply' (of '{reply}' in fields) is missing; the row has id",
        ),
        (
            {"output": "answers"},
            "is an object, not text; name a value in it, such as answers.text.0",
        ),
        ({"output": "{title"}, "has a single {; write {{"),
    ],
)
def test_a_path_that_leads_nowhere_names_what_is_there(
    fields: Any, said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        spoken(
            config(tmp_path, SQUAD, fields={"instruction": "question", **fields}, format="alpaca")
        )
    assert said in str(caught.value)


def test_an_optional_field_may_lack_a_value_but_not_a_key() -> None:
    fields = {"input": "meta.note"}
    row = {"instruction": "q", "output": "a"}
    for meta in ({}, {"meta": None}, {"meta": {"note": None}}):
        assert to_example("alpaca", row | meta, fields).messages[0]["content"] == "q"
    assert (
        to_example("alpaca", row | {"meta": {"note": 3}}, fields).messages[0]["content"] == "q\n\n3"
    )
    for broken in (row | {"meta": {"nots": "x"}}, row | {"system": True}):
        with pytest.raises(Rejected):
            to_example("alpaca", broken, fields)


@pytest.mark.parametrize(
    ("turns", "roles", "line"),
    [
        (CUSTOMER, {"Customer": "user", "Agent": "assistant"}, "{Customer: ROLE, Agent: ROLE}"),
        (SPEAKER, {"Kunde": "user", "Bot 2": "assistant"}, "{Kunde: ROLE, Bot 2: ROLE}"),
    ],
)
def test_roles_have_other_names(turns: Any, roles: Any, line: str, tmp_path: Path) -> None:
    rows = [{"messages": turns}] * 12
    with pytest.raises(UserError) as caught:
        spoken(config(tmp_path, rows))
    assert f"'data.train.0.roles={line}'" in str(caught.value)
    # What is given already stays in the line.
    first = next(iter(roles))
    with pytest.raises(UserError) as caught:
        spoken(config(tmp_path, rows, roles={first: "user"}))
    assert f"{{{first}: user, " in str(caught.value)
    prompt, answer = spoken(config(tmp_path, rows, roles=roles))
    assert "user\nlate" in prompt
    assert answer == "sorry<|im_end|>"


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_numbers_of_labels_have_names(kind: str, tmp_path: Path) -> None:
    labels = {"label": NAMES}
    given = config(tmp_path, IMDB, kind, fields=CLASSIFY, labels=labels)
    texts = "".join(helpers.texts(prepare(given, helpers.spec(), "train")))
    assert [texts.count(f"\n{name}<|im_end|>") for name in NAMES] == [6, 6]
    # -1 is the label of a row without one.
    without = [{**row, "label": -1} for row in IMDB]
    with pytest.raises(UserError) as caught:
        spoken(config(tmp_path, without, kind, fields=CLASSIFY, labels=labels))
    assert "field 'label' is -1; labels has names for 0 to 1" in str(caught.value)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_files_of_datasets_name_their_labels_themselves(kind: str, tmp_path: Path) -> None:
    import datasets

    label = datasets.ClassLabel(names=NAMES)
    features = {
        "text": datasets.Value("string"),
        "label": label,
        "topics": datasets.Sequence(label),
    }
    rows = [{"text": "film", "label": 0, "topics": [0, 1]}] * 12
    table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        table.to_parquet(path)
    else:
        table.save_to_disk(path)
    given = {"path": str(path), "fields": {"prompt": "{text} {topics.1}", "completion": "label"}}
    prompt, answer = spoken(helpers.config(tmp_path / "runs", given, max_length=512))
    assert "user\nfilm positive<|im_end|>" in prompt
    assert answer == "negative<|im_end|>"


@pytest.mark.parametrize(
    ("rows", "more"),
    [
        ([helpers.chat("q", "a")] * 12, {}),
        ([{"instruction": "q", "output": "a"}] * 12, {}),
        ([{"prompt": "q", "completion": "a"}] * 12, {"chat": True}),
    ],
)
def test_chats_without_a_system_message_get_that_of_the_source(
    rows: Any, more: Any, tmp_path: Path
) -> None:
    assert (
        "system\nBe brief.<|im_end|>"
        in spoken(config(tmp_path, rows, system="Be brief.", **more))[0]
    )
    own = [{**row, "system": "Be rude."} for row in rows]
    if "messages" in rows[0]:
        own = [{"messages": [{"role": "system", "content": "Be rude."}, *rows[0]["messages"]]}] * 12
    if "completion" not in rows[0]:
        assert "brief" not in spoken(config(tmp_path, own, system="Be brief."))[0]


@pytest.mark.parametrize(
    ("source", "field"),
    [
        ({"roles": {"Agent": "bot"}}, "roles.Agent: "),
        (
            {"roles": {"Agent": "user"}, "format": "alpaca"},
            "roles: rows of format alpaca have no turns",
        ),
        ({"system": "x", "format": "text"}, "system: rows of format text are no chats"),
        ({"system": "x", "format": "prompt_completion", "chat": False}, "system: rows of format"),
        ({"labels": {"label": [0, 1]}}, "labels.label.0: "),
        ({"system": "x"}, "data.train.0.system: rows of format text are no chats"),
        ({"markup": "guanaco"}, "data.train.0.markup: rows of format text have none"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(source: Any, field: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        spoken(config(tmp_path, [{"text": "just a text"}] * 12, **source))
    assert field in str(caught.value)


def test_the_settings_enter_the_digest_only_if_they_are_set(tmp_path: Path) -> None:
    fields = {"instruction": "q", "output": "a"}
    rows = [{"q": "x", "a": "y"}] * 12

    def digest(**source: Any) -> str:
        given = config(tmp_path, rows, format="alpaca", **source)
        return plan_here(given, helpers.spec(), "train").digest()

    before = digest(fields=fields)
    assert before == "02de4a7c5a4b59c812d45d5737d4ff1a"
    assert digest(fields=fields, roles={}, labels={}, markup="auto") == before
    others = [
        {"fields": fields | {"output": "{a}"}},
        {"fields": fields, "labels": {"a": NAMES}},
        {"fields": fields, "system": "x"},
    ]
    assert len({before, *(digest(**other) for other in others)}) == 4
