"""Types of the config's fields that say where something lies."""

from typing import Annotated

from pydantic import AfterValidator


def _straight(place: str) -> str:
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
