"""The same rows as jsonl and as parquet have the same tokens."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from olora_ray.tokens.prepare import prepare
from tests.tokens import helpers

TOOLS = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
USER = {"role": "user", "content": "q"}


def tool(name: str, **parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


ROWS = [
    {
        "tools": [
            tool("weather", city={"type": "string"}),
            tool("sum", expr={"type": "string", "enum": ["1", "2"]}),
        ],
        "messages": [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [call("weather", city="X")]},
        ],
    },
    {
        "tools": [tool("sum", expr={"type": "string"})],
        "messages": [
            USER,
            {
                "role": "assistant",
                "content": "so",
                "tool_calls": [call("sum", expr="1+1"), call("sum", deep={"b": [1]})],
            },
            {"role": "tool", "content": "2", "name": "sum"},
            {"role": "assistant", "content": "two", "weight": 1},
        ],
    },
    {"tools": None, "messages": [USER, {"role": "assistant", "content": "a"}]},
]


def tokens(folder: Path, path: Path, format: str) -> list[str]:
    source = {"path": str(path), "format": format}
    config = helpers.config(
        folder / "runs", source, max_length=2000, packing=False, max_rejected=0.0
    )
    return sorted(helpers.texts(prepare(config, helpers.spec(TOOLS), "train")))


def sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    turns = [
        {"from": m["role"], "value": m["content"], **{k: m[k] for k in m if k == "tool_calls"}}
        for m in row["messages"]
    ]
    return {"conversations": turns, "tools": row["tools"], "system": "s" if row["tools"] else None}


def prompts(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": row["messages"][:1], "completion": row["messages"][1:], "tools": row["tools"]}


@pytest.mark.parametrize(
    ("format", "rows"),
    [
        ("messages", ROWS),
        ("sharegpt", [sharegpt(row) for row in ROWS]),
        ("prompt_completion", [prompts(row) for row in ROWS]),
    ],
)
def test_parquet_and_jsonl_of_the_same_rows_have_the_same_tokens(
    format: str, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    # Arrow gives every tool the parameters of all tools, and every call the arguments of all calls.
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert '"expr": null' in json.dumps(read)
    expected = tokens(tmp_path, helpers.write_jsonl(tmp_path / "a.jsonl", rows), format)
    assert len(expected) == 3
    assert tokens(tmp_path, tmp_path / "a.parquet", format) == expected
    assert "null" not in "".join(expected)
    # Rows that were converted by Arrow once, and written as jsonl with Arrow's nulls.
    assert tokens(tmp_path, helpers.write_jsonl(tmp_path / "b.jsonl", read), format) == expected
