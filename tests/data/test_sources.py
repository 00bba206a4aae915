"""Every type of source, with real files, down to the tokens."""

import bz2
import csv
import glob
import gzip
import hashlib
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from olora_ray.common.errors import UserError
from olora_ray.config.load import override
from olora_ray.config.section import Source
from olora_ray.data import reader, scan, sources
from olora_ray.data.formats.format import Rejected
from olora_ray.data.tokenizer_spec import TokenizerSpec
from olora_ray.tokens.prepare import prepare
from tests.data.reading import listed, names
from tests.said import said
from tests.tokens import helpers

ROWS = [{"prompt": f"{n}+{n}=", "completion": f'{2 * n}, "süß"\nand {n}'} for n in range(700)]


def as_jsonl(path: Path) -> None:
    path.write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    )  # no newline at the end


def as_csv(path: Path, delimiter: str = ",") -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def as_parquet(path: Path) -> None:
    parquet.write_table(
        pa.Table.from_pylist([{**row, "id": 1} for row in ROWS]), path, row_group_size=300
    )


def packed(
    write: Callable[[Path], None], compress: Callable[[bytes], bytes]
) -> Callable[[Path], None]:
    """Two streams, as parallel compressors and `cat a.gz b.gz` write them."""

    def writer(path: Path) -> None:
        write(path)
        content = path.read_bytes()
        path.write_bytes(compress(content[:5000]) + compress(content[5000:]))

    return writer


def as_saved(path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(path, num_shards=2)


KINDS: dict[str, Callable[[Path], None]] = {
    "a.jsonl": as_jsonl,
    "a.jsonl.gz": packed(as_jsonl, gzip.compress),
    "a.jsonl.zst": packed(as_jsonl, zstandard.ZstdCompressor().compress),
    "a.json": lambda path: path.write_text(json.dumps(ROWS)) and None,
    "b.json": lambda path: (
        path.write_text(json.dumps({k: [row[k] for row in ROWS] for k in ROWS[0]})) and None
    ),
    "a.parquet": as_parquet,
    "a.csv": as_csv,
    "a.csv.gz": packed(as_csv, gzip.compress),
    "a.tsv": lambda path: as_csv(path, "\t"),
    "a.jsonl.bz2": packed(as_jsonl, bz2.compress),
    "a.jsonl.xz": packed(as_jsonl, lzma.compress),
    "saved": as_saved,
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_the_same_rows(
    name: str, tmp_path: Path, tiny_spec: TokenizerSpec
) -> None:
    KINDS[name](tmp_path / name)
    for path in (str(tmp_path / name), f"file://{tmp_path / name}"):
        source = {"path": path, "format": "prompt_completion", "chat": False}
        config = helpers.config(tmp_path / "runs", source, eval=[source])
        store = prepare(config, tiny_spec, "eval")
        assert sorted(helpers.texts(store)) == sorted(
            f"<s>{row['prompt']}{row['completion']}</s>" for row in ROWS
        )


def places(path: Path) -> list[tuple[int, Any]]:
    """Return all rows of a file with their positions, read unit by unit from the last to the first."""
    [file] = sources.list_files(source(path), "data.train.0", str(path.parent))
    found = scan.scan(file, str(path.parent))
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.rows == sum(unit.rows for unit in found.units)
    if file.compression is None and file.kind in ("jsonl", "csv", "tsv"):
        record_lines = 1 if file.kind == "jsonl" else 2
        assert all(
            unit.size <= scan.UNIT_BYTES or unit.rows <= record_lines for unit in found.units
        )
    parts = [
        list(reader.read_unit(file, unit, found.columns, ["prompt", "completion"]))
        for unit in reversed(found.units)
    ]
    return [row for part in reversed(parts) for row in part]


def source(path: Path | str, **changes: Any) -> Any:
    config = helpers.config(
        Path("/nowhere"), {"path": str(path), "format": "prompt_completion", **changes}
    )
    return config.data.train[0]


@pytest.mark.parametrize("name", [name for name in KINDS if name != "saved"])
def test_units_cover_a_file_exactly_and_know_their_places(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    KINDS[name](tmp_path / name)
    for size in (7, 64, scan.UNIT_BYTES):
        monkeypatch.setattr(scan, "UNIT_BYTES", size)
        monkeypatch.setattr(scan, "CHUNK", 8 * size)
        found = places(tmp_path / name)
        assert [row for _, row in found] == ROWS
        # In csv a row takes two lines here, after the header.
        expected = (
            [1 + 2 * n for n in range(len(ROWS))]
            if "csv" in name or "tsv" in name
            else list(range(len(ROWS)))
        )
        assert [place for place, _ in found] == expected


def test_blank_lines_bom_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n   \n{"prompt": "c"}')
    assert places(path) == [(0, {"prompt": "a"}), (2, {"prompt": "b"}), (4, {"prompt": "c"})]
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfprompt,completion\r\na,b\r\n\r\nc,d\r\n")
    assert places(path) == [
        (1, {"prompt": "a", "completion": "b"}),
        (3, {"prompt": "c", "completion": "d"}),
    ]


def test_lines_that_cannot_be_read_do_not_harm_others(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    digits = b'{"id": ' + b"1" * 5000 + b"}"
    path.write_bytes(
        b'{"prompt": 1}\n{"prompt": \n\xff\xfe\n['
        + b"[" * 99999
        + b"\n"
        + digits
        + b'\n{"prompt": 2}\n'
    )
    found = places(path)
    reasons = [row.reason if isinstance(row, Rejected) else row for _, row in found]
    assert reasons == [
        {"prompt": 1},
        "broken_json",
        "not_utf8",
        "broken_json",
        "broken_json",
        {"prompt": 2},
    ]
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,completion\na,b\nc\nd,\xff\ne,f\n")
    reasons = [
        row.reason if isinstance(row, Rejected) else row["prompt"] for _, row in places(path)
    ]
    assert reasons == ["a", "broken_csv", "not_utf8", "e"]


def test_quotes_that_are_written_with_backslashes_are_refused(tmp_path: Path) -> None:
    # Exports of Spark and MySQL have them: csv.reader silently removes characters and moves quotes.
    path = tmp_path / "a.csv"
    lines = [
        "prompt|completion",
        r'"He said \"hi\" to me"|"ok"',
        '"a ""b"" c"|"two\nlines"',
        r'"ends with C:\"|x',
        'a 5" pipe|"x\ry"',
        r'"again \"|\" here"|y',
        r"no \" quoted|z",
    ]
    path.write_text("".join(line.replace("|", ",") + "\r\n" for line in lines), newline="")
    found = [row.message if isinstance(row, Rejected) else row["prompt"] for _, row in places(path)]
    assert found == [
        r'a quote inside a quoted cell is written as \", not doubled as ""',
        'a "b" c',
        "ends with C:\\",
        'a 5" pipe',
        "3 cells, but the header has 2",
        r"no \" quoted",
    ]


def test_a_text_of_a_parquet_file_that_is_none_rejects_its_row_alone(tmp_path: Path) -> None:
    texts = pa.array([b"a", b"\xed\xa0\x80", b"c"]).view(
        pa.string()
    )  # as a writer that checks nothing leaves it
    parquet.write_table(pa.table({"prompt": texts}), tmp_path / "a.parquet")
    found = places(tmp_path / "a.parquet")
    assert [row.reason if isinstance(row, Rejected) else row["prompt"] for _, row in found] == [
        "a",
        "not_utf8",
        "c",
    ]


def test_a_text_file_is_a_document_and_a_large_one_several(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("line one\nline two\nline three\n")
    assert places(path) == [(0, {"text": "line one\nline two\nline three\n"})]
    lines = [f"{'x' * 600_000}{number}\n" for number in range(3)]
    path.write_text("".join(lines))
    assert places(path) == [(0, {"text": lines[0] + lines[1]}), (1, {"text": lines[2]})]


@pytest.mark.parametrize("name", [b"caf\xe9.jsonl", b"caf\xe9/a.jsonl"])
def test_a_name_that_is_not_utf8_is_told(name: bytes, tmp_path: Path) -> None:
    # The first look sees three of many files: the scan of another one ended with a traceback.
    path = os.fsencode(tmp_path) + b"/" + name
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.write("{}\n")
    with pytest.raises(
        UserError, match=r"^data\.train\.0\.path: '.*/caf\\udce9.*': the name is not UTF-8; rename"
    ):
        listed(tmp_path)


@pytest.mark.parametrize(("log", "kind"), [("_delta_log", "Delta"), (".hoodie", "Hudi")])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_table_whose_log_is_not_read_is_told(
    scheme: str, log: str, kind: str, tmp_path: Path
) -> None:
    # Old and current files are in one folder, so deleted rows would be trained on.
    def table(number: int) -> Path:
        folder = tmp_path / str(number) / "table"
        (folder / log).mkdir(parents=True)
        (folder / log / "0.json").write_text("{}")
        as_parquet(folder / "part-0.parquet")
        return folder

    place = f"{scheme}{table(0)}"
    with said() as lines:
        assert names(place) == ["part-0.parquet"]
    assert lines[0].startswith(
        f"warning: data.train.0.path: {place} is a {kind} table ({log}), but all its files are read"
    )
    for number, pattern in enumerate(("*.parquet", "**"), 1):
        as_parquet(table(number) / log / "0.checkpoint.parquet")
        with said() as lines:
            assert names(f"{scheme}{tmp_path}/{number}/table/{pattern}") == ["part-0.parquet"], (
                "nor is the log read"
            )
        assert any(
            line.startswith("warning: ") and f"table is a {kind} table ({log})" in line
            for line in lines
        )


PLACES = ["a.csv", "b-0.csv", "b-1.csv", "[a].csv", "x/c.csv", "x/y/d.csv"]
HIDDEN = [".x/e.csv", "x/.f.csv", "_x/g.csv", "x/.y/h.csv"]
GLOBS = [
    "*",
    "[xb]*",
    "*.csv",
    "b-[!0].csv",
    "b-[01].csv",
    "[[]a].csv",
    "**/*.csv",
    "*/*.csv",
    "x/**/*.csv",
    "x/**",
]
HIDDEN_GLOBS = ["x/.*", ".x/*", "**/.*/*.csv"]


@pytest.mark.parametrize("pattern", GLOBS + HIDDEN_GLOBS)
def test_a_glob_means_the_same_on_a_disk_and_on_an_object_store(
    pattern: str, tmp_path: Path
) -> None:
    for name in PLACES + HIDDEN:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    matching = {
        name for name in glob.glob(f"{tmp_path}/{pattern}", recursive=True) if Path(name).is_file()
    }
    local, remote = (
        [file.uri.removeprefix("file://") for file in listed(f"{scheme}{tmp_path}/{pattern}")]
        for scheme in ("", "file://")
    )
    assert matching <= set(local)
    assert sorted(remote) == sorted(local)


def test_splits_of_a_saved_data_set(tmp_path: Path) -> None:
    import datasets

    parts = {name: datasets.Dataset.from_list(ROWS[:3]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    for root in (f"{tmp_path}/saved", f"file://{tmp_path}/saved"):
        [train] = listed(root)
        [test] = listed(f"{root}?split=test")
        assert "/train/" in train.uri
        assert "/test/" in test.uri
        with pytest.raises(
            UserError, match=r"data.train.0.path: .*no split 'dev'; it has train, test"
        ):
            listed(f"{root}?split=dev")


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_saved_data_set_does_not_lead_out_of_its_folder(scheme: str, tmp_path: Path) -> None:
    import datasets

    for name in ("mine", "saved"):
        datasets.Dataset.from_list(ROWS[:3]).save_to_disk(tmp_path / name)
    state = tmp_path / "saved" / "state.json"
    [entry] = json.loads(state.read_text())["_data_files"]
    outside = f"../mine/{entry['filename']}"
    state.write_text(json.dumps({"_data_files": [{"filename": outside}]}))
    with pytest.raises(
        UserError, match=r"data.train.0.path: .*saved names '\.\./mine/.*is not in this folder"
    ):
        listed(f"{scheme}{tmp_path}/saved")
    (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": [".."]}))
    with pytest.raises(UserError):
        listed(f"{scheme}{tmp_path}/saved?split=..")


@pytest.mark.parametrize("name", ["a/b/c", "/etc", "a//b", ".hidden/x", "~/x", "org/.."])
def test_a_data_set_of_the_hub_is_no_path(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"data.train.0.path: .*(not the name of a data set|not contain '..')"
    ):
        sources.list_files(source(f"hf://{name}"), "data.train.0", str(tmp_path))


def test_a_data_set_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_spec: TokenizerSpec
) -> None:
    # No hub is reachable here, but `datasets` accepts a folder of that name in place of a name of the hub.
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    helpers.write_jsonl(tmp_path / "org/name/train.jsonl", ROWS[:50])
    helpers.write_jsonl(tmp_path / "org/name/test.jsonl", ROWS[50:60])
    monkeypatch.chdir(tmp_path)
    hub = {"path": "hf://org/name?split=train"}
    config = helpers.config(
        tmp_path / "runs", hub, eval=[{**hub, "path": "hf://org/name?split=test"}]
    )
    store = prepare(config, tiny_spec, "train")
    assert store.manifest.rows == 50
    assert all(name.startswith(f"{tmp_path}/runs/tokens/hub/") for name in store.manifest.files)
    assert prepare(config, tiny_spec, "eval").manifest.rows == 10
    # The first look downloads nothing, so the preparation looks at the columns.
    helpers.write_jsonl(
        tmp_path / "org/marked/train.jsonl",
        [{**row, "rejected": f"{n} a"} for n, row in enumerate(ROWS)],
    )
    marked = helpers.config(
        tmp_path / "runs", {"path": "hf://org/marked", "format": "prompt_completion"}
    )
    with pytest.raises(
        UserError,
        match=r"data.train.0: column 'rejected' may decide what its row means",
    ):
        prepare(marked, tiny_spec, "train")
    both = config.data.train[0].model_copy(update={"path": "hf://org/name?split=train+test"})
    config = override(config, {"data.train": [both.model_dump()]})
    assert prepare(config, tiny_spec, "train").manifest.rows == 60
    with pytest.raises(UserError):
        sources.list_files(source("hf://org/other"), "data.train.0", str(tmp_path))
    with pytest.raises(UserError):
        sources.list_files(source("hf://org/name?splits=x"), "data.train.0", str(tmp_path))


BROKEN: dict[str, tuple[bytes, str]] = {
    "a.json": (b'[{"prompt": 1},\n{"prompt": }]', r"a.json, line 2: broken JSON: Expecting value"),
    "a.parquet": (b"no parquet at all", r"a.parquet: not a readable parquet file"),
    "a.jsonl.gz": (b"no gzip at all, but long enough", r"a.jsonl.gz: not a readable gzip file"),
    "b.jsonl.gz": (gzip.compress(os.urandom(4000))[:2000], r"b.jsonl.gz: not a readable gzip file"),
    "f.json": (b"[" * 10**6, r"f.json: broken JSON: nested too deeply"),
    "empty.jsonl": (b"", r"data.train.0.path: .*empty.jsonl is empty: it has no rows"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_cannot_be_read(name: str, tmp_path: Path, tiny_spec: TokenizerSpec) -> None:
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    config = helpers.config(
        tmp_path / "runs", {"path": str(tmp_path / name), "format": "prompt_completion"}
    )
    with pytest.raises(UserError, match=message) as caught:
        prepare(config, tiny_spec, "train")
    assert "\n" not in str(caught.value)


def test_only_some_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    wanted = [f"{tmp_path}/a.jsonl", f"{tmp_path}/c.jsonl"]
    source = Source(path=str(tmp_path), format="text", only=tuple(wanted))
    assert [
        file.uri for file in sources.list_files(source, "data.train.0", str(tmp_path))
    ] == wanted
    gone = Source(path=str(tmp_path), format="text", only=(f"{tmp_path}/x.jsonl",))
    with pytest.raises(
        UserError, match=r"data\.train\.0\.only: .*x\.jsonl is not among the files of"
    ):
        sources.list_files(gone, "data.train.0", str(tmp_path))
