"""Folders that `Dataset.save_to_disk` and `DatasetDict.save_to_disk` of the library `datasets` have written."""

import json
import posixpath
from typing import Any

from olora_ray.common.errors import UserError

SPLITS, STATE = "dataset_dict.json", "state.json"
SAVED = (SPLITS, STATE)
"""Files of such a folder, one of which it has."""


def saved_files(system: Any, folder: str, split: str, field: str) -> list[Any]:
    """The Arrow files of a folder that `datasets` has saved; empty if it is no such folder."""
    try:
        if (splits := _json_file(system, f"{folder}/{SPLITS}")) is not None:
            there = [str(name) for name in splits["splits"]]
            if split not in there:
                raise UserError(
                    f"{field}: {folder} has no split {split!r}; it has {', '.join(there)} (choose with ?split=...)"
                )
            folder = f"{folder}/{_inside(split, folder, field)}"
        state = _json_file(system, f"{folder}/{STATE}")
        entries = [str(entry["filename"]) for entry in state["_data_files"]] if state is not None else []
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{field}: {folder}: what Dataset.save_to_disk wrote there is damaged") from None
    names = [_inside(name, folder, field) for name in entries]
    infos = system.get_file_info([f"{folder}/{name}" for name in names])
    for info in infos:
        if not info.is_file:
            raise UserError(f"{field}: {info.path} belongs to the saved data set, but is not there")
    return list(infos)


def _inside(name: str, folder: str, field: str) -> str:
    """The name, if it is that of something in the folder: a data set may come from anybody."""
    if name in (".", "..") or posixpath.basename(name) != name:
        raise UserError(f"{field}: {folder} names {name!r}, which does not lie in it")
    return name


def _json_file(system: Any, path: str) -> Any:
    if not system.get_file_info(path).is_file:
        return None
    with system.open_input_stream(path, compression=None) as stream:
        return json.loads(stream.read())
