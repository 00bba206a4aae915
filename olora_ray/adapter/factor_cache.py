"""Cache of factors: a search computes them once, and its trials read them."""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from olora_ray.adapter.layer import Factors
from olora_ray.common import node_cache, records, storage

TENSORS = "factors.safetensors"
DESCRIPTION = "factors.json"


@dataclass(frozen=True)
class StoredFactors:
    """Factors of one origin and rank in a folder, which may hold those of a higher rank."""

    folder: str
    """Path or URI."""
    origin: Mapping[str, str]
    """Digests and settings that identify the inputs of the factors."""
    rank: int

    def write(self, factors: Mapping[str, Factors], prefix: bool = True) -> None:
        """Write factors; `prefix` is that of their method."""
        parts: dict[str, Tensor] = {}
        for name, item in factors.items():
            parts[f"{name}.a0"] = item.a0
            if item.b0 is not None:
                parts[f"{name}.b0"] = item.b0
        content = save({name: part.contiguous().cpu() for name, part in parts.items()})
        storage.write_bytes(storage.join(self.folder, TENSORS), content)
        # Factors that the weight does not determine are not reused at a smaller rank: computed there, the arbitrary
        # part may differ from the first columns kept here.
        whole = all(item.full_rank for item in factors.values())
        described = {**self.origin, "rank": self.rank, "full_rank": whole, "prefix": prefix}
        records.write(storage.join(self.folder, DESCRIPTION), described)

    def exist(self) -> bool:
        """True if the folder has factors of this origin from which the factors of this rank follow."""
        return self._description() is not None

    def _description(self) -> dict[str, Any] | None:
        described = None
        with contextlib.suppress(OSError):  # computing them again is better than to end a training
            described = records.read(storage.join(self.folder, DESCRIPTION), dict[str, Any])
        if not described or not described.get("full_rank"):
            return None
        if {**described, **self.origin} != described:
            return None
        # Without a prefix only the same rank will do: another has other factors, and layers may differ in rank.
        larger = described.get("prefix") and described["rank"] > self.rank
        if described["rank"] == self.rank or larger:
            return described
        return None

    def read(self, names: Iterable[str]) -> dict[str, Factors] | None:
        """Return the factors of these layers; None if missing, of another origin, or of too small a rank."""
        description = self._description()
        if description is None:
            return None
        limit = self.rank if description["prefix"] else None
        try:
            with (
                node_cache.fetched(storage.join(self.folder, TENSORS)) as local,
                safe_open(local, "pt") as file,
            ):
                keys = set(file.keys())
                factors = {}
                for name in names:
                    b0 = None
                    if f"{name}.b0" in keys:
                        b0 = _first(file.get_slice(f"{name}.b0"), -1, limit)
                    factors[name] = Factors(_first(file.get_slice(f"{name}.a0"), -2, limit), b0)
                return factors
        except (OSError, SafetensorError):
            return None


def _first(stored: Any, dim: int, rank: int | None) -> Tensor:
    # A slice of the stored tensor, so that nothing else of it is read.
    slices = [slice(None)] * len(stored.get_shape())
    slices[dim] = slice(rank)
    part: Tensor = stored[tuple(slices)]
    return part.contiguous()
