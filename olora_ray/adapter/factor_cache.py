"""Cache of factors: computed once for a search, and read by its trials.

    factors.safetensors      NAME.a0 ((E x) R x n) and NAME.b0 ((E x) m x R) at the largest rank R of the search
    factors.json             what they were computed from; written last

Where a method promises that the factors of a smaller rank are a prefix of those of a larger one (the first columns of
Q, the first rows of R; for plain LoRA the first rows of A), one file serves all ranks up to R; else R alone. They are
those for scale 1 (adapter/methods/method.py), so that alpha does not enter.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from olora_ray.adapter.factors import Factors
from olora_ray.common import copies, storage

TENSORS, DESCRIPTION = "factors.safetensors", "factors.json"


def write(
    place: str, factors: Mapping[str, Factors], origin: Mapping[str, str], rank: int, prefix: bool = True
) -> None:
    """Keep factors in the folder `place`; `origin` says what they were computed from, `prefix` is the method's."""
    parts: dict[str, Tensor] = {}
    for name, found in factors.items():
        parts[f"{name}.a0"] = found.a0
        if found.b0 is not None:
            parts[f"{name}.b0"] = found.b0
    with tempfile.TemporaryDirectory(prefix="olora-factors-") as folder:
        save_file({name: part.contiguous().cpu() for name, part in parts.items()}, Path(folder) / TENSORS)
        storage.write_bytes(storage.join(place, TENSORS), (Path(folder) / TENSORS).read_bytes())
    # A prefix of a completed slice need not be what the smaller slice is completed to.
    whole = all(found.full_rank for found in factors.values())
    described = {**origin, "rank": rank, "full_rank": whole, "prefix": prefix}
    storage.write_text(storage.join(place, DESCRIPTION), json.dumps(described))


def has(place: str, origin: Mapping[str, str], rank: int) -> bool:
    """Whether factors of this origin are kept there from which those of this rank follow."""
    return _description(place, origin, rank) is not None


def _description(place: str, origin: Mapping[str, str], rank: int) -> dict[str, Any] | None:
    """What is said of the factors there, if those of this origin and rank follow from them."""
    try:
        found = json.loads(storage.read_text(storage.join(place, DESCRIPTION)))
        enough = found["rank"] >= rank if _is_prefix(found) else found["rank"] == rank
        return found if found["full_rank"] and enough and {**found, **origin} == found else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_prefix(description: Mapping[str, Any]) -> bool:
    """Whether the first rows and columns are those of a smaller rank; else layers may have ranks of their own."""
    # Without the word they are of a version whose methods all promised it.
    return bool(description.get("prefix", True))


def read(place: str, origin: Mapping[str, str], rank: int, names: list[str]) -> dict[str, Factors] | None:
    """The factors of these layers at `rank`; None if they are not there, of another origin, or too small."""
    description = _description(place, origin, rank)
    if description is None:
        return None
    limit = rank if _is_prefix(description) else None
    try:
        with (
            copies.fetched(storage.join(place, TENSORS)) as local,
            safe_open(local, "pt") as file,
        ):
            there = set(file.keys())
            return {
                name: Factors(
                    _first(file.get_slice(f"{name}.a0"), -2, limit),
                    _first(file.get_slice(f"{name}.b0"), -1, limit) if f"{name}.b0" in there else None,
                )
                for name in names
            }
    except (OSError, SafetensorError):
        return None


def _first(stored: Any, dim: int, rank: int | None) -> Tensor:
    """The first `rank` (None: all) of a stored tensor's dimension `dim`; nothing else of it is read."""
    places = [slice(None)] * len(stored.get_shape())
    places[dim] = slice(rank)
    part: Tensor = stored[tuple(places)]
    return part.contiguous()
