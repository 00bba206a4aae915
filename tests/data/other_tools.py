"""Files in the forms of other tools, with the rows of their documentation, and the result of reading each.

    right     all rows become the intended conversations, with the intended answers supervised
    refused   the first look or the dry run ends with one line
    WRONG     anything else

pandas, Hugging Face's datasets, TRL's helpers and Python's json and csv write the files themselves. Excel's dialect,
separators and encodings are imitated. Axolotl, LLaMA-Factory, ms-swift and OpenAI read files but write none, so only
their rows are imitated.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer

from olora_ray.common.errors import UserError
from olora_ray.config.schema import Config
from olora_ray.tokens.preview import describe
from tests import tiny
from tests.said import said
from tests.tokens import helpers

# Texts of the rows: with quotes, separators and line ends, and with letters that differ between encodings.


ASK = [
    'Was kostet "Käse"; 5 € oder mehr?',
    "Zwei Zeilen,\nbitte: größer | kleiner?",
    "Ist 'ß' ein Buchstabe?\tJa, nein",
    'Öffne C:\\Äpfel\\"neu"; dann?',
]
SAY = [
    'Höchstens 4,50 €;\n"ganz" sicher –\tja.',
    "„Übermorgen“, sagt er; nicht heute.",
    '"Ja", \\ und / auch: ÄÖÜäöüß.',
    "[1, 2] ist {keine} Liste\n\nEnde, 3|4",
]
SYSTEM = "Antworte kurz; auf „Deutsch“,\nbitte."
ROWS = range(len(ASK))
TOOL = {
    "type": "function",
    "function": {"name": "wetter", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"name": "wetter", "arguments": {"ort": "Köln"}}

# Role and text. The role is `context` for an answer that is not trained on, and `call` for a tool call.
Turn = tuple[str, str]
Row = dict[str, Any]


def once(n: int, system: str = "") -> list[Turn]:
    return [*([("system", system)] if system else []), ("user", ASK[n]), ("assistant", SAY[n])]


def twice(n: int, system: str = "", first: str = "assistant") -> list[Turn]:
    return [*once(n - 1, system)[:-1], (first, SAY[n - 1]), *once(n)]


def called(n: int) -> list[Turn]:
    """A question that is answered with the help of a tool."""
    return [("user", ASK[n]), ("call", ""), ("tool", "Regen, 5 °C"), ("assistant", SAY[n])]


def messages(
    turns: Sequence[Turn], role: str = "role", content: str = "content", **names: str
) -> list[Row]:
    # `names` maps roles to other names.
    named = {"context": names.get("assistant", "assistant"), **names}
    return [{role: named.get(who, who), content: text} for who, text in turns]


FROM_VALUE = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
sharegpt = partial(messages, **FROM_VALUE)


def marked(turns: Sequence[Turn], key: str, no: Any, yes: Any, **names: str) -> list[Row]:
    """The messages with a key that says which answers are trained on."""
    found = messages(turns, **names)
    for (who, _), message in zip(turns, found, strict=True):
        message.update({key: no} if who == "context" else {key: yes} if who == "assistant" else {})
    return found


def openai_calls(n: int) -> list[Row]:
    """Messages with a tool call in the form of OpenAI's API: its arguments are JSON text."""
    user, _, tool, answer = messages(called(n))
    function = {
        "name": CALL["name"],
        "arguments": json.dumps(CALL["arguments"], ensure_ascii=False),
    }
    call = {
        "role": "assistant",
        "tool_calls": [{"id": "c1", "type": "function", "function": function}],
    }
    return [user, call, {**tool, "tool_call_id": "c1"}, answer]


def sharegpt_calls(n: int) -> list[Row]:
    """Messages with a tool call in the form of LLaMA-Factory."""
    user, _, tool, answer = sharegpt(called(n), tool="observation")
    return [user, {"from": "function_call", "value": json.dumps(CALL)}, tool, answer]


# The rows, by the tool whose documentation describes them.


@dataclass(frozen=True)
class Shape:
    """Rows of one form."""

    # Row number n.
    row: Callable[[int], Row]
    # The intended conversation or document.
    turns: Callable[[int], list[Turn] | str] = once
    # Settings that are detected, and would be needed otherwise; without them format messages.
    settings: Mapping[str, Any] = field(default_factory=dict)
    tools: bool = False
    # A column that is ignored, which the first look reports.
    unread: str = ""


def fields(format: str, **names: str) -> dict[str, Any]:
    return {"format": format, **({"fields": names} if names else {})}


def chatml(n: int) -> Row:
    """A dump of ShareGPT, converted by TRL's helper."""
    from trl.data_utils import maybe_convert_to_chatml

    found: Row = maybe_convert_to_chatml({"conversations": sharegpt(twice(n))})
    return found


SHAPES: dict[str, dict[str, Shape]] = {
    "OpenAI": {
        "chat": Shape(lambda n: {"messages": messages(once(n, SYSTEM))}, lambda n: once(n, SYSTEM)),
        "tools": Shape(
            lambda n: {"messages": openai_calls(n), "tools": [TOOL], "parallel_tool_calls": False},
            called,
            tools=True,
        ),
        "completion": Shape(
            lambda n: {"prompt": ASK[n], "completion": SAY[n]}, once, fields("prompt_completion")
        ),
    },
    "ShareGPT": {
        "dump": Shape(
            lambda n: {"id": f"x{n}", "conversations": sharegpt(twice(n))},
            twice,
            fields("sharegpt"),
        ),
        "empty columns": Shape(  # OpenHermes
            lambda n: {
                "conversations": sharegpt(once(n)),
                **dict.fromkeys(["system_prompt", "title", "hash", "views", "custom_instruction"]),
                "source": "a",
            },
            once,
            fields("sharegpt", system="system_prompt"),
        ),
    },
    "Axolotl": {
        "alpaca": Shape(
            lambda n: {"instruction": ASK[n], "input": "", "output": SAY[n]}, once, fields("alpaca")
        ),
        "open_orca": Shape(
            lambda n: {
                "id": f"x{n}",
                "system_prompt": SYSTEM,
                "question": ASK[n],
                "response": SAY[n],
            },
            lambda n: once(n, SYSTEM),
            fields("alpaca", system="system_prompt", instruction="question", output="response"),
        ),
        "context_qa": Shape(
            lambda n: {"article": SYSTEM, "question": ASK[n], "answer": SAY[n]},
            lambda n: [("user", f"{ASK[n]}\n\n{SYSTEM}"), ("assistant", SAY[n])],
            fields("alpaca", input="article", instruction="question", output="answer"),
        ),
        "pygmalion": Shape(
            lambda n: {
                "conversations": messages(twice(n), content="value", user="human", assistant="bot")
            },
            twice,
            {"format": "sharegpt", "fields": {"from": "role"}},
        ),
        "train": Shape(
            lambda n: {
                "conversations": marked(
                    twice(n, first="context"),
                    "train",
                    False,
                    True,
                    **FROM_VALUE | {"assistant": "assistant"},
                )
            },
            lambda n: twice(n, first="context"),
            fields("sharegpt"),
        ),
        # The tokens <s> and </s> of the test's tokenizer, as an empty document has them.
        "tokens": Shape(
            lambda n: {"input_ids": [1, 2], "attention_mask": [1, 1], "labels": [-100, 2]},
            lambda n: "",
            fields("tokens"),
        ),
    },
    "LLaMA-Factory": {
        "alpaca": Shape(
            lambda n: {
                "instruction": ASK[n],
                "input": "",
                "output": SAY[n],
                "system": SYSTEM,
                "history": [[ASK[n - 1], SAY[n - 1]]],
            },
            lambda n: twice(n, SYSTEM),
            fields("alpaca"),
        ),
        "sharegpt": Shape(
            lambda n: {"conversations": sharegpt(twice(n)), "system": SYSTEM, "tools": ""},
            lambda n: twice(n, SYSTEM),
            fields("sharegpt"),
        ),
        "tools": Shape(
            lambda n: {"conversations": sharegpt_calls(n), "tools": json.dumps([TOOL])},
            called,
            fields("sharegpt"),
            tools=True,
        ),
    },
    "ms-swift": {
        "query": Shape(
            lambda n: {"query": ASK[n], "response": SAY[n]},
            once,
            fields("alpaca", instruction="query", output="response"),
        ),
        "loss": Shape(
            lambda n: {"messages": marked(twice(n, first="context"), "loss", False, True)},
            lambda n: twice(n, first="context"),
        ),
    },
    "TRL": {
        "prompt": Shape(
            lambda n: {"prompt": ASK[n], "completion": SAY[n]}, once, fields("prompt_completion")
        ),
        "chat prompt": Shape(
            lambda n: {
                "prompt": messages(once(n, SYSTEM)[:-1]),
                "completion": messages(once(n)[-1:]),
            },
            lambda n: once(n, SYSTEM),
            fields("prompt_completion"),
        ),
        "messages": Shape(chatml, twice),
        "tools": Shape(
            lambda n: {"messages": openai_calls(n), "tools": json.dumps([TOOL])}, called, tools=True
        ),
    },
    "table": {
        "qa": Shape(
            lambda n: {"question": ASK[n], "answer": SAY[n]},
            once,
            fields("alpaca", instruction="question", output="answer"),
        ),
        "dolly": Shape(
            lambda n: {
                "instruction": ASK[n],
                "context": SYSTEM,
                "response": SAY[n],
                "category": "a",
            },
            lambda n: [("user", f"{ASK[n]}\n\n{SYSTEM}"), ("assistant", SAY[n])],
            fields("alpaca", input="context", output="response"),
            unread="category",
        ),
        "system prompt": Shape(
            lambda n: {"system": SYSTEM, "prompt": ASK[n], "completion": SAY[n]},
            lambda n: once(n, SYSTEM),
            fields("alpaca", instruction="prompt", output="completion"),
        ),
        "roles": Shape(
            lambda n: {"System": SYSTEM, "User": ASK[n], "Assistant": SAY[n]},
            lambda n: once(n, SYSTEM),
            fields("alpaca", system="System", instruction="User", output="Assistant"),
        ),
        "messages": Shape(
            lambda n: {"messages": json.dumps(messages(twice(n)), ensure_ascii=False)},
            twice,
            fields("messages"),
        ),
    },
}


# The writers.


def lines(path: Path, rows: Sequence[Row], encoding: str = "utf-8", end: str = "\n") -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)
    path.write_bytes(text.encode(encoding))


def listed(path: Path, rows: Sequence[Row], indent: int | None = 2) -> None:
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=indent), encoding="utf-8")


def sheet(path: Path, rows: Sequence[Row], delimiter: str, encoding: str) -> None:
    """A sheet of Excel: its dialect of csv, with the delimiter of its language."""
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]), dialect="excel", delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def frame(method: str, **options: Any) -> Callable[[Path, Sequence[Row]], None]:
    return lambda path, rows: getattr(pd.DataFrame(list(rows)), method)(path, **options)


def dataset(method: str, **options: Any) -> Callable[[Path, Sequence[Row]], None]:
    return lambda path, rows: getattr(Dataset.from_list(list(rows)), method)(str(path), **options)


def splits(path: Path, rows: Sequence[Row]) -> None:
    other = Dataset.from_list([dict.fromkeys(rows[0])] * 2, Dataset.from_list(list(rows)).features)
    DatasetDict({"train": Dataset.from_list(list(rows)), "test": other}).save_to_disk(str(path))


def folder(path: Path, rows: Sequence[Row]) -> None:
    """A snapshot of the hub: a file for each part of a split."""
    path.mkdir()
    dataset("to_parquet")(path / "train-00000-of-00002.parquet", rows[:2])
    dataset("to_parquet")(path / "train-00001-of-00002.parquet", rows[2:])
    dataset("to_parquet")(path / "test-00000-of-00001.parquet", rows[:1])
    (path / "README.md").write_text("---\nlicense: mit\n---\n")


WRITERS: dict[str, tuple[str, Callable[[Path, Sequence[Row]], None]]] = {
    "json": ("a.jsonl", lines),
    "json, BOM and CRLF": ("a.jsonl", partial(lines, encoding="utf-8-sig", end="\r\n")),
    "json, UTF-16": ("a.jsonl", partial(lines, encoding="utf-16")),
    "json, lines in .json": ("a.json", lines),
    "json, a list": ("a.json", listed),
    "json, a list in .jsonl": ("a.jsonl", listed),
    "json, a list in a line of .jsonl": ("a.jsonl", partial(listed, indent=None)),
    "datasets.to_json": ("a.jsonl", dataset("to_json")),
    "datasets.to_json .json": ("a.json", dataset("to_json")),
    "datasets.to_csv": ("a.csv", dataset("to_csv")),
    "datasets.to_parquet": ("a.parquet", dataset("to_parquet")),
    "datasets.save_to_disk": ("a", dataset("save_to_disk")),
    "datasets, splits on disk": ("a", splits),
    "datasets, hub snapshot": ("a", folder),
    "pandas.to_csv": ("a.csv", frame("to_csv")),
    "pandas.to_csv no index": ("a.csv", frame("to_csv", index=False)),
    "pandas.to_csv sep=;": ("a.csv", frame("to_csv", index=False, sep=";")),
    "pandas.to_csv sep=tab": ("a.csv", frame("to_csv", index=False, sep="\t")),
    "pandas.to_csv sep=|": ("a.csv", frame("to_csv", index=False, sep="|")),
    "pandas.to_csv .tsv": ("a.tsv", frame("to_csv", index=False, sep="\t")),
    "pandas.to_csv .xz": ("a.csv.xz", frame("to_csv", index=False, sep=";", encoding="cp1252")),
    "pandas.to_json": ("a.json", frame("to_json")),
    "pandas.to_json records": ("a.json", frame("to_json", orient="records", force_ascii=False)),
    "pandas.to_json lines .jsonl": (
        "a.jsonl",
        frame("to_json", orient="records", lines=True, force_ascii=False),
    ),
    "pandas.to_json index": ("a.json", frame("to_json", orient="index")),
    "pandas.to_json split": ("a.json", frame("to_json", orient="split")),
    "pandas.to_parquet": ("a.parquet", frame("to_parquet")),
    "Excel, German": ("a.csv", partial(sheet, delimiter=";", encoding="cp1252")),
    "Excel, German, UTF-8": ("a.csv", partial(sheet, delimiter=";", encoding="utf-8-sig")),
    "Excel, English": ("a.csv", partial(sheet, delimiter=",", encoding="cp1252")),
    "Excel, Unicode text as .csv": ("a.csv", partial(sheet, delimiter="\t", encoding="utf-16")),
    "Excel, Unicode text": ("a.txt", partial(sheet, delimiter="\t", encoding="utf-16")),
    "Google Sheets": ("a.csv", partial(sheet, delimiter=",", encoding="utf-8")),
}


@dataclass(frozen=True)
class File:
    """One file of the test."""

    tool: str
    shape: str
    writer: str
    # A part of the line that refuses such a file, although its rows alone would be read.
    cannot: str = ""

    @property
    def name(self) -> str:
        return f"{self.tool}: {self.shape} | {self.writer}"

    @property
    def rows(self) -> Shape:
        return SHAPES[self.tool][self.shape]

    def write(self, folder: Path) -> Path:
        name, write = WRITERS[self.writer]
        write(folder / name, [self.rows.row(n) for n in ROWS])
        return folder / name


# Writers of tables only.
SHEETS = [name for name, (file, _) in WRITERS.items() if ".csv" in file or ".tsv" in file]
# Files that are refused, whatever rows they have.
CANNOT = {
    "pandas.to_json split": "expected a list of rows",
    "Excel, Unicode text": "not UTF-8 text",
}
# The writers for each form of rows; other forms are written as JSON lines.
WRITTEN: dict[tuple[str, str], Sequence[str]] = {
    ("table", "qa"): [
        *SHEETS,
        *(name for name in WRITERS if name.startswith("pandas.to_json")),
        *CANNOT,
    ],
    ("OpenAI", "chat"): [name for name in WRITERS if name.startswith(("json", "datasets.to_json"))],
    ("ShareGPT", "dump"): ["json, a list", "json, lines in .json", "datasets.to_parquet"],
    ("Axolotl", "alpaca"): [
        "json",
        "json, a list",
        "datasets.to_csv",
        "datasets.save_to_disk",
        "datasets, splits on disk",
    ],
    ("LLaMA-Factory", "alpaca"): ["json, a list", "json"],
    ("LLaMA-Factory", "sharegpt"): ["json, a list", "datasets.to_json .json"],
    ("ms-swift", "query"): ["json", "pandas.to_csv no index", "Excel, German"],
    ("TRL", "prompt"): [
        "json",
        "datasets.to_csv",
        "datasets.to_json .json",
        "datasets, hub snapshot",
    ],
    ("TRL", "chat prompt"): ["datasets.to_json", "datasets.to_parquet"],
    ("TRL", "messages"): ["datasets.save_to_disk", "datasets.to_parquet", "datasets.to_json .json"],
    ("TRL", "tools"): ["datasets.to_json", "pandas.to_parquet"],
    ("table", "dolly"): ["json", "pandas.to_parquet", "Excel, German, UTF-8"],
    ("table", "roles"): ["Excel, German"],
    ("table", "system prompt"): ["Excel, English", "pandas.to_csv sep=;"],
    ("table", "messages"): ["datasets.to_csv", "Excel, German"],
}
FILES = [
    File(tool, shape, writer, CANNOT.get(writer, ""))
    for tool, shapes in SHAPES.items()
    for shape in shapes
    for writer in dict.fromkeys(WRITTEN.get((tool, shape), ["json"]))
]


# The result of reading a file.


TEMPLATE = (
    "{% for tool in tools or [] %}<tool>{{ tool.function.name }}\n{% endfor %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<call>{{ call.function.name }} {{ call.function.arguments | tojson }}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END = "<|im_end|>"
WRITTEN_CALL = f"<call>{CALL['name']} {json.dumps(CALL['arguments'], ensure_ascii=False)}"


def _json() -> str:
    """The tokenizer with one token per letter, with the letters that Windows has beyond Latin-1."""
    tree = json.loads(helpers.spec().json)
    vocabulary = tree["model"]["vocab"]
    vocabulary.update({letter: len(vocabulary) + n for n, letter in enumerate("€–„“’…")})
    return json.dumps(tree)


SPEC = helpers.spec(TEMPLATE, json=_json())
TOKENIZER = Tokenizer.from_str(SPEC.json)


def expected(shape: Shape) -> Iterator[tuple[str, str]]:
    """The text of each row as the model should see it, and its supervised part."""
    for n in ROWS:
        turns = shape.turns(n)
        if isinstance(turns, str):
            yield f"<s>{turns}</s>", f"{turns}</s>"
            continue
        text, trained = f"<tool>{TOOL['function']['name']}\n" if shape.tools else "", ""
        for who, words in turns:
            role = {"context": "assistant", "call": "assistant"}.get(who, who)
            written = WRITTEN_CALL if who == "call" else words
            text += f"<|im_start|>{role}\n{written}{END}\n"
            trained += f"{written}{END}" if who in ("assistant", "call") else ""
        yield text, trained


def outcome(file: File, folder: Path) -> str:
    """The result for a file whose source sets only its path (right, refused or WRONG), and the message."""
    config = helpers.config(
        folder / "runs", str(file.write(folder)), max_length=600, max_rejected=0
    )
    try:
        with said() as lines:
            known = tiny.read_as(config).data.train[0]
            rows = sorted(
                _read(
                    helpers.config(
                        folder / "runs", known.model_dump(), max_length=600, max_rejected=0
                    )
                )
            )
    except UserError as error:
        line = str(error).replace(f"{folder}/", "")
        return f"{'refused' if _is_meant(file, line) else 'WRONG'}: {line}"
    if file.cannot:
        return f"WRONG: {len(rows)} rows are trained on, the first as {rows[0]}"
    read = {name: column for name, column in known.fields.items() if column != "none"}
    if {"format": known.format, "fields": read} != {
        "format": "messages",
        "fields": {},
    } | file.rows.settings:
        return f"WRONG: {known}"
    if file.rows.unread not in " ".join(line for line in lines if "left out: " in line):
        return f"WRONG: nothing is said of {file.rows.unread}"
    meant = sorted(expected(file.rows))
    line = next(line for line in lines if " rows in " in line)
    return f"right: {line}" if rows == meant else f"WRONG: not {meant[0]} but {rows[0]}"


def _is_meant(file: File, line: str) -> bool:
    """True if the file should be refused, and the one-line message says why."""
    return bool(file.cannot) and file.cannot in line and "\n" not in line


def _read(config: Config) -> Iterator[tuple[str, str]]:
    """The same as `expected`, from a dry run; raise UserError."""
    for pack in describe(config, SPEC).some_packs:
        start = 0
        for length in pack.segments:
            ids, supervised = (
                part[start : start + length] for part in (pack.input_ids, pack.supervised)
            )
            yield _text(ids), _text(ids[supervised])
            start += length


def _text(ids: Any) -> str:
    return "".join(TOKENIZER.id_to_token(int(one)) for one in ids)
