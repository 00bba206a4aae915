"""Schedule of a run: its length and the learning rate of each step, also while the token store is still growing.

Both follow from the config and the content of the store alone: a run that starts on the first shard and
one that starts on the complete store take the same steps with the same rates, bit for bit.

    train.steps, or one shard:   step k of T has the rate lr_at(k, T).
    train.epochs, many shards:   T is unknown until the last shard is there, so progress is measured in data.
                                 Step k starts at place p = k G of the training order, in epoch e:

        progress = (e + fraction) / epochs
        fraction = (shard + place in the shard / sequences of the shard) / shards    in epoch 0
                 = (p - e packs) / packs                                             later

    Shards are of about equal size, and their number is known from the start. Warm-up is the same share of
    the progress as it is of the steps, up to the *end* of the step, so that the first update is not lost.
"""

from olora_ray.config.schema import Train
from olora_ray.tokens.store import TokenStore
from olora_ray.train.loader import Waiting, total_steps, until
from olora_ray.train.optim import lr_at, shape


class Schedule:
    """Length and learning rates of a run."""

    def __init__(self, train: Train, store: TokenStore, waiting: Waiting | None = None) -> None:
        """`waiting` is called while `last` and `lr` wait for shards."""
        self.train, self.store, self.waiting = train, store, waiting

    def total(self) -> int | None:
        """Steps of the run; None while the store does not tell yet."""
        if self.train.steps is None and self.store.total is None:
            self.store.refresh()
        return self._total()

    def ends(self, steps_done: int) -> bool | None:
        """Whether the run is over after so many steps; None while that is not certain. Does not look for shards."""
        total = self._total()
        if total is not None:
            return steps_done >= total
        # More sequences never make fewer steps.
        return False if steps_done < total_steps(self.train, self.store.available) else None

    def last(self, steps_done: int) -> bool:
        """Whether the run is over after so many steps; waits for shards until it is certain."""
        until(self.store, lambda: self.ends(steps_done) is not None, self.waiting)
        return bool(self.ends(steps_done))

    def lr(self, step: int) -> float:
        """Learning rate of update number `step`, from 0; waits for the shards that the step reads."""
        size = self.train.global_batch
        if self.train.steps is None:
            until(self.store, lambda: self._knows((step + 1) * size), self.waiting)
        total = self._total()
        if total is not None and (self.train.steps is not None or self.store.shard_count == 1):
            return lr_at(step, total, self.train)
        warmup, begin = self.train.warmup, self._progress(step * size, after=False)
        if begin < warmup:
            return self.train.lr * min(1.0, self._progress((step + 1) * size - 1, after=True) / warmup)
        return self.train.lr * shape(self.train.schedule, (begin - warmup) / (1.0 - warmup))

    def _total(self) -> int | None:
        packs = self.store.total
        return self.train.steps or (None if packs is None else total_steps(self.train, packs))

    def _knows(self, places: int) -> bool:
        return self.store.total is not None or (self.store.shard_count > 1 and places <= self.store.available)

    def _progress(self, place: int, after: bool) -> float:
        """Progress at, or just after, a place of the training order; 0 to 1."""
        packs = self.store.total
        epoch, inside = divmod(place, packs) if packs else (0, place)
        if epoch == 0:
            shard, row, rows = self.store.locate(inside)
            fraction = (shard + (row + after) / rows) / self.store.shard_count
        else:
            assert packs is not None
            fraction = (inside + after) / packs
        # A part of an epoch can lie in shards that are smaller than the others.
        return min(1.0, (epoch + fraction) / self.train.epochs)
