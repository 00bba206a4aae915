"""What a glob matches, on a disk and in the listing of an object store: in both the same, as `glob.glob` has it.

Folders whose names begin with a dot or an underscore are passed over where a glob matches them as wholes, and so is
what a table writes about itself, unless the glob names it.
"""

import glob
import itertools
import os
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

TABLES = {"_delta_log": "Delta", ".hoodie": "Hudi"}
"""Folders that make a table of a folder of Parquet files: they say which of these have its rows as they are now."""

Below = tuple[Any, str]
"""A file of a listing, and its path below the folder that is listed."""


def local(path: str) -> list[str]:
    """What matches a glob, by name."""
    fixed, pattern = split(path)
    found = sorted(glob.glob(path, recursive=True))
    below = [(name, name[len(fixed) :].strip("/")) for name in found]
    return [
        name
        for name, relative in below
        if not _in_log(relative, pattern) and not (_unasked(relative, pattern) and os.path.isdir(name))
    ]


def table_of(path: str) -> str:
    """The folder that is a table if the file at `path` is one of its."""
    table = os.path.dirname(path)
    while "=" in os.path.basename(table):  # of a partition
        table = os.path.dirname(table)
    return table


def split(path: str) -> tuple[str, str]:
    """The folder before the first wildcard of a glob, and the pattern behind it."""
    wildcard = re.search(r"[*?\[]", path)
    fixed = path[: wildcard.start()].rpartition("/")[0] if wildcard else path
    return fixed, path[len(fixed) :].strip("/")


def _unasked(name: str, pattern: str) -> bool:
    """Whether a folder that matches a glob is passed over, as one in a folder is: `_delta_log`, unless it is named."""
    return not visible(name) and visible(pattern)


def _in_log(name: str, pattern: str) -> bool:
    """Whether what matches a glob belongs to what a table writes about itself, which the glob does not name."""
    return any(f"/{log}/" in f"/{name}/" and log not in pattern.split("/") for log in TABLES)


def matching(below: Sequence[Below], pattern: str) -> tuple[list[Any], dict[str, list[Below]]]:
    """The files that match a glob, and by the names of the folders that match it what else lies in these."""
    parts = pattern.split("/")
    files, folders = list[Any](), dict[str, list[Below]]()
    for item, name in below:
        names = name.split("/")
        if _in_log(name, pattern):
            continue
        if _matches(names, parts):
            files.append(item)
            continue
        end = next((end for end in range(1, len(names)) if _matches(names[:end], parts)), 0)
        if end and not _unasked("/".join(names[:end]), pattern):
            folders.setdefault("/".join(names[:end]), []).append((item, "/".join(names[end:])))
    return files, folders


def tables_among(below: Sequence[Below], files: Sequence[Any], path: str) -> dict[str, list[str]]:
    """Of the folders that are tables those in which some of the files lie, with what makes them one."""
    inside = [f"/{item.path[len(path) :].strip('/')}" for item in files]
    found: dict[str, set[str]] = {}
    for (_, name), log in itertools.product(below, TABLES):
        folder, there, _ = f"/{name}".partition(f"/{log}/")
        if there:
            found.setdefault(folder, set()).add(log)
    return {
        folder.strip("/"): sorted(logs)
        for folder, logs in found.items()
        if any(each.startswith(f"{folder}/") for each in inside)
    }


def _matches(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether the parts of a path match those of a glob, as `glob.glob` takes both: a hidden name by its dot alone."""
    if not parts or not names:
        return not names and all(part == "**" for part in parts)
    hidden = names[0].startswith(".") and not parts[0].startswith(".")
    if parts[0] == "**":
        return _matches(names, parts[1:]) or (not hidden and _matches(names[1:], parts))
    return not hidden and fnmatchcase(names[0], parts[0]) and _matches(names[1:], parts[1:])


def visible(relative: str) -> bool:
    """Whether no part of a path begins with a dot or an underscore."""
    return not any(part.startswith((".", "_")) for part in relative.split("/"))
