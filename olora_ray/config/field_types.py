"""Types of single fields: bounds, patterns of names, places."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
NAME = r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9_-])?$"
MODEL_NAME = r"^\w([\w .-]*\w)?$"
EXPERIMENT = r"^[^\x00-\x1f\x7f]+$"
WEBHOOK = r"^(https?://|env:|file:/)."
LONGEST_NAME = 200
"""Bytes of a name that files are called by. A file's name has at most 255, and lock files add up to 44."""
LONGEST_EXPERIMENT = 256
"""MLflow itself checks for 500 characters, but its column in PostgreSQL and MySQL has 256."""
LONGEST_ALIAS = 255
"""MLflow's own limit, in characters."""


def _fits_a_file(name: str) -> str:
    if (size := len(name.encode())) > LONGEST_NAME:
        raise ValueError(f"{size} bytes long; at most {LONGEST_NAME} are possible, because files get this name")
    return name


def extended(name: str, end: str) -> str:
    """`name-end`, with the name cut where both would be too long."""
    return f"{name[: LONGEST_NAME - len(end) - 1]}-{end}"


FileName = Annotated[str, Field(pattern=NAME), AfterValidator(_fits_a_file)]
ModelName = Annotated[str, Field(pattern=MODEL_NAME), AfterValidator(_fits_a_file)]
AliasName = Annotated[str, Field(pattern=NAME, max_length=LONGEST_ALIAS)]
ExperimentName = Annotated[str, Field(pattern=EXPERIMENT, max_length=LONGEST_EXPERIMENT)]


_ONE_SLASH = re.compile(r"(?!models:)([A-Za-z][\w.+-]+):/(?!/)")
"""The beginning of an address that lost a slash, which would be a folder called `s3:` in the current one."""


def _straight(place: str) -> str:
    if found := _ONE_SLASH.match(place):
        slashes = "///" if found[1] == "file" else "//"
        raise ValueError(f"an address has {slashes} behind the colon; write {found[1]}:{slashes}{place[found.end() :]}")
    if "://" in place and ".." in place.partition("?")[0].split("/"):
        raise ValueError("a URI cannot go up with '..'; write the address without it")
    return place


def _without_options(place: str) -> str:
    if "://" in place and not place.startswith("file://") and (sign := next((c for c in "?#%" if c in place), None)):
        raise ValueError(
            f"an address cannot have {sign!r} here; write it without, and name the server of an object store by the"
            " variables AWS_ENDPOINT_URL and AWS_REGION, on all nodes"
        )
    return place


Place = Annotated[str, AfterValidator(_straight)]
"""A path, or a URI without '..': what that means differs between object stores."""
Folder = Annotated[Place, AfterValidator(_without_options)]
"""A place that others lie below, so an address without options."""
