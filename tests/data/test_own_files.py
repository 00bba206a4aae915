"""The files of own_files.py hold what their cases say, read by libraries that are none of ours."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

from tests.data.own_files import FORMS, HARMLESS, MATTERS, Case, Row, without, write


def read_back(case: Case, path: Path) -> list[Row]:
    if case.form == "arrow":
        with pa.ipc.open_stream(path / "data-00000-of-00001.arrow") as stream:
            return stream.read_all().to_pylist()
    if case.form == "parquet":
        return pd.read_parquet(path).to_dict("records")
    if case.form in ("jsonl", "jsonl.gz"):
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            return [json.loads(line) for line in file]
    if case.form == "json":
        return json.loads(path.read_text())
    if case.form == "columns":
        return pd.read_json(path, dtype=False).to_dict("records")
    sep, encoding = {"excel": (";", "cp1252"), "tsv": ("\t", "utf-8")}.get(
        case.form, (",", "utf-8")
    )
    read = pd.read_csv(path, sep=sep, encoding=encoding, dtype=str, keep_default_na=False)
    return read.rename(
        columns={"Unnamed: 0": case.columns[0]} if "" in case.columns else {}
    ).to_dict("records")


@pytest.mark.parametrize("case", MATTERS + HARMLESS, ids=lambda case: case.name)
def test_a_file_has_the_columns_of_its_case(case: Case, tmp_path: Path) -> None:
    rows = read_back(case, write(case, tmp_path))
    assert len(rows) == len(case.rows)
    assert 8 <= len(rows) <= 20
    for name in case.columns:
        key, _, inner = name.partition("[].")
        assert all(key in row for row in rows)
        texts = [(row[key], written[key]) for row, written in zip(rows, case.rows, strict=True)]
        assert all(found == text for found, text in texts if isinstance(text, str))
        assert not inner or any(inner in turn for row in rows for turn in row[key])
    plain = tmp_path / "plain"
    plain.mkdir()
    assert len(read_back(without(case), write(without(case), plain))) == len(rows)


def test_there_are_sixty_of_each_at_least_and_all_forms() -> None:
    for cases in MATTERS, HARMLESS:
        assert len(cases) >= 60
        assert min(Counter(case.form for case in cases).values()) >= 4
        assert {case.form for case in cases} == set(FORMS)
    assert len({case.name for case in MATTERS + HARMLESS}) == len(MATTERS + HARMLESS)
    assert all(case.read or case.untrained for case in MATTERS if case.expect == "used or refused")
