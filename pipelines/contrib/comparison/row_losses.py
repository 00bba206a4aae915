"""The losses of a finished training on each test row, for the adapter after the last step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from olora_ray.cluster.spec import GUARD, TrainResult
from olora_ray.common.errors import UserError
from olora_ray.config.schema import Config
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.tokens.store import TokenStore
from olora_ray.train.checkpoint import TrainState


@dataclass(frozen=True)
class RowLosses:
    """Losses of one adapter: one entry for each example of the store, in its order."""

    places: tuple[str, ...]
    """file:line of each example, without folders."""
    tokens: tuple[int, ...]
    """Supervised tokens of each example."""
    losses: tuple[float, ...]
    """Losses, each summed over these tokens."""
    trainable: int
    """Number of trained parameters of the adapter."""
    forgotten: float | None = None
    """Rise of the loss on other texts since the start, in nats per token; None in older trainings."""

    def mean(self) -> float:
        return sum(self.losses) / sum(self.tokens)

    def by_group(
        self, groups: Mapping[str, Sequence[int]]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return (losses, tokens), each (groups,), summed over the examples of a group; `groups` by file and line."""
        # Numbers of groups may have gaps where a group's rows were too long, so they are renumbered.
        numbers = np.unique(group_numbers(self.places, groups), return_inverse=True)[1]
        losses, tokens = (
            np.bincount(numbers, each).astype(np.float64) for each in (self.losses, self.tokens)
        )
        return losses, tokens

    def counts(self, groups: Mapping[str, Sequence[int]]) -> tuple[int, int]:
        """Return (rows, groups) that have losses: a row that is too long has no tokens."""
        return len(set(self.places)), len(set(group_numbers(self.places, groups)))


class Result(NamedTuple):
    losses: tuple[float, ...]
    """Loss of each example, summed over its tokens."""
    trainable: int
    precision: str | None
    """Precision of the base by torch's name."""
    forgotten: float | None


def result_of(root: str, config: Config, count: int) -> Result:
    """Return the result of a finished training on `count` examples; raises UserError if it is lost."""
    result = RunFolder(root).state().trained(config) or TrainResult()
    losses = result.state.examples if result.state else None
    if losses is None or result.trainable is None or len(losses) != count:
        raise UserError(
            f"{RunFolder(root).training}: the losses of the test rows are lost; delete {root} and run the same command"
            " again"
        )
    assert result.state is not None
    state = result.state
    return Result(tuple(losses), result.trainable, state.precision, _forgotten(state))


def _forgotten(state: TrainState) -> float | None:
    guard = {row["step"]: row[GUARD] for row in state.history if GUARD in row}
    if 0 not in guard or state.step not in guard:
        return None
    return guard[state.step] - guard[0]


def places_of(store: TokenStore | None) -> tuple[str, ...]:
    assert store is not None
    return tuple(
        place.rpartition("/")[2] for number in range(len(store)) for place in store.origins(number)
    )


def group_numbers(places: Sequence[str], groups: Mapping[str, Sequence[int]]) -> list[int]:
    """Return the group of each place; `groups` by file and line."""
    return [
        groups[name][int(line) - 1] for name, _, line in (place.rpartition(":") for place in places)
    ]
