"""Values of parquet files that Python has no type for."""

from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from olora_ray.config.load import build
from olora_ray.data import detect
from olora_ray.data.formats import to_example
from olora_ray.data.formats.format import Chat
from tests.data.reading import listed, rows


@pytest.mark.parametrize(
    "values",
    [
        pa.array([2**62, 0], pa.timestamp("us")),
        pa.array([2**31 - 1, 0], pa.date32()),
        pa.array([2**62, 0], pa.duration("s")),
        pa.array([1, 0], pa.timestamp("us", "Mars/Phobos")),
        pa.array([[2**62], [0]], pa.list_(pa.timestamp("us"))),
    ],
    ids=lambda values: str(values.type),
)
def test_a_time_that_python_does_not_have_is_a_text(values: pa.Array, tmp_path: Path) -> None:
    # Databases have such a time (infinity), and the first look reads all columns.
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["a", "b"], "until": values}), path)
    found = rows(*listed(path))
    assert [row["text"] for row in found] == ["a", "b"]
    assert isinstance(found[0]["until"], str)
    data = {"train": [{"path": str(path), "format": "text", "fields": {"until": "none"}}]}
    detect.check_data(
        build(
            {"run": {"name": "r", "storage": str(tmp_path)}, "model": {"name": "m"}, "data": data}
        )
    )


def as_maps(of: pa.DataType) -> pa.DataType:
    return pa.map_(pa.string(), of)


TEXT = pa.string()


def test_maps_are_objects(tmp_path: Path) -> None:
    # Spark writes each dict as a map. Pairs of key and value were no messages, and tool arguments were other JSON.
    function = pa.struct({"name": TEXT, "arguments": as_maps(TEXT)})
    call = pa.struct({"type": TEXT, "function": function})
    turn = pa.struct({"role": TEXT, "content": TEXT, "tool_calls": pa.list_(call)})
    arguments = {"city": "Rome", "day": None}
    calls = [{"type": "function", "function": {"name": "weather", "arguments": arguments}}]
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": calls}]
    tools = [{"name": "weather", "parameters": {"city": {"type": "string"}}}]
    path = tmp_path / "a.parquet"
    columns = {
        "messages": pa.array([turns], pa.list_(turn)),
        "tools": pa.array(
            [tools], pa.large_list(pa.struct({"name": TEXT, "parameters": as_maps(as_maps(TEXT))}))
        ),
        "plain": pa.array([[{"role": "user", "content": "?"}, None]], pa.list_(as_maps(TEXT))),
    }
    parquet.write_table(pa.table(columns), path)
    [row] = rows(*listed(path))
    assert row["tools"] == tools
    assert row["plain"] == [{"role": "user", "content": "?"}, None]
    chat = to_example("messages", row, {})
    assert isinstance(chat, Chat)
    assert chat.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}
