"""The files of mobility records: which there are in a folder, and who reads them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from olora_ray.common.errors import UserError, as_user_error
from olora_ray.data.mobility import check_ins, foursquare, geolife
from olora_ray.data.mobility.records import Reader, Records, Repairs, collect

READERS: Mapping[str, tuple[Reader, tuple[str, ...]]] = {
    "checkins": (check_ins.read, (".csv",)),
    "foursquare": (foursquare.read, (".txt", ".tsv")),
    "geolife": (geolife.read, (".plt",)),
}
"""Name of a format -> its reader, and the endings of its files in a folder."""


def read(paths: Sequence[str], format: str, repairs: Repairs) -> Records:
    """The records in files and folders; raises UserError for what is not there or cannot be read."""
    if format not in READERS:
        raise UserError(f"argument --format: {format or 'nothing'!r} is not known; there are {', '.join(READERS)}")
    reader, endings = READERS[format]
    files = [file for path in paths for file in _files(Path(path), endings)]
    with as_user_error("argument RECORDS", OSError):
        return collect(reader(files, repairs), repairs)


def _files(path: Path, endings: Sequence[str]) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"argument RECORDS: {path}: no such file or folder")
    if found := sorted(file for file in path.rglob("*") if file.suffix.lower() in endings and file.is_file()):
        return found
    raise UserError(f"argument RECORDS: {path}: no file ends in {' or '.join(endings)}")
