"""Front of a token store: what is known of the shards at its start, while more are made."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from olora_ray.tokens.manifest import ShardInfo


@dataclass(frozen=True)
class Front:
    """The known shards; replaced as a whole, since threads read while another looks for more."""

    shards: list[ShardInfo]
    """At least these: what `more` adds is shared with those that came before."""
    ends: NDArray[np.int64]
    """(shards + 1,) sequences before each shard, and in all; the front of an array that has room for all."""

    @classmethod
    def of(cls, shards: Sequence[ShardInfo], total: int) -> "Front":
        """The first shards of `total`."""
        room = np.zeros(max(total, len(shards)) + 1, dtype=np.int64)
        return cls([], room[:1]).more(shards)

    def more(self, shards: Sequence[ShardInfo]) -> "Front":
        """With some more, in time that depends on these alone; of one `Front` this is asked once."""
        assert len(self.shards) == len(self)
        room = self.ends.base
        assert isinstance(room, np.ndarray)
        count = len(self) + len(shards)
        room[len(self.ends) : count + 1] = self.ends[-1] + np.cumsum([shard.packs for shard in shards])
        self.shards.extend(shards)
        return Front(self.shards, room[: count + 1])

    def all(self) -> tuple[ShardInfo, ...]:
        """The shards."""
        return tuple(self.shards[: len(self)])

    def __len__(self) -> int:
        return len(self.ends) - 1
