"""Detection of a text file's form by its first bytes: encoding, delimiter, one JSON value or one per line.

Only the scan detects it; the result is kept with the scan and is part of the name of the token store.
"""

import codecs
import csv
import io
import json
import re

BOM = b"\xef\xbb\xbf"
DELIMITERS = {"csv": ",", "tsv": "\t", "semicolon csv": ";", "pipe csv": "|"}
SEPARATOR = re.compile(r'"?sep=([,;|\t])"?[,;|\t]?\r?\n')
"""First line by which Excel names the delimiter of a csv file."""
NULLS = {"nan", "NaN", "NULL", "null", "None", "<NA>"}
"""Cells of csv that pandas, databases and Python write for no value."""
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
# Letters of Western Europe, dashes and quotes, as UTF-8 writes them.
_IN_UTF_8 = re.compile(rb"[\xc2\xc3][\x80-\xbf]|\xe2\x80")
# Marks of a text in another code page that is read as cp1252: Icelandic letters (Turkish, Czech, Croatian, Vietnamese),
# signs inside words (Polish).
_FOREIGN = re.compile(r"[ÐÝÞðýþÿŸ]|[^\W\d_][¡-©«-´¶¸¹»-¿×÷][^\W\d_]")


def as_written(kind: str, begin: bytes) -> tuple[str, str | None]:
    """Return type and encoding of a file that starts with `begin`; in doubt its type is `kind`, from its name."""
    encoding = None
    if begin.startswith(_UTF_16):
        encoding = "utf-16"
    elif kind in DELIMITERS and _is_cp1252(begin):
        encoding = "cp1252"
    text = begin.decode(encoding or "utf-8-sig", "replace")
    if kind == "csv":
        kind = _by_cells(text)
    elif kind in ("json", "jsonl"):
        text = text.lstrip()
        first, _, rest = text.partition("\n")
        if rest.strip() and _is_json(first):
            kind = "jsonl"
        elif re.match(r"\[\s*\{", text):
            kind = "json"
    return kind, encoding


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _is_cp1252(begin: bytes) -> bool:
    # Excel writes csv in this encoding in Western Europe.
    try:
        codecs.getincrementaldecoder("utf-8")().decode(begin)
    except UnicodeDecodeError:
        pass
    else:
        return False
    broken = [
        letter == "\ufffd" for letter in begin.decode("utf-8", "replace") if not letter.isascii()
    ]
    if 2 * sum(broken) <= len(broken) or _IN_UTF_8.search(begin):  # UTF-8 with a broken letter
        return False
    try:
        text = begin.decode("cp1252")
    except UnicodeDecodeError:
        return False
    # In Greek, Cyrillic and the languages of Asia nearly all letters are outside ASCII.
    ascii_letters = sum(letter.isascii() for letter in text if letter.isalpha())
    return not _FOREIGN.search(text) and len(broken) <= ascii_letters


def _by_cells(text: str) -> str:
    # The delimiter that the first line names, commas, or the only other one that separates the names of the header.
    named = SEPARATOR.match(text)
    if named:
        return next(kind for kind, delimiter in DELIMITERS.items() if delimiter == named[1])

    def names(kind: str) -> int:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=DELIMITERS[kind])
        return sum(bool(cell.strip()) for cell in next(filter(None, rows), ()))

    try:
        several = [kind for kind in DELIMITERS if names(kind) > 1]
    except csv.Error:  # the scan reports the line
        return "csv"
    if len(several) == 1:
        return several[0]
    return "csv"
