"""The reference of preference pairs: the loss of each segment before the first step, measured once.

It lies beside the shards of the token store, sealed, and is named by everything that decides its bits. So the trials of
a search share one pass, and a resumed run reads what it began with.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from olora_ray.common import collectives, records, storage
from olora_ray.common.errors import UserError
from olora_ray.common.storage import digest_json
from olora_ray.tokens.plan import CHOSEN
from olora_ray.tokens.store import TokenStore
from olora_ray.train.held_out import held_out
from olora_ray.train.loop import Trainer

logger = logging.getLogger(__name__)
Losses = list[tuple[float, ...]]
"""Of each sequence, the losses of its segments."""


@dataclass(frozen=True)
class Reference:
    identity: dict[str, str]
    losses: Losses
    sha256: str
    """Digest of `losses`."""


def give(
    trainer: Trainer,
    store: TokenStore,
    attention: str,
    identity: Mapping[str, str],
    known: str | None = None,
) -> str:
    """Give a complete store its reference, from its file or by a pass with the present adapter; return the digest.

    All workers must call it together. `identity` names what decides the losses, and `known` is the digest that the run
    has noted. Raises UserError if the losses are others.
    """
    named = {**identity, "tokens": store.digest}
    path = storage.join(store.uri, f"reference-{digest_json(named, length=16)}.json")
    first = collectives.rank() == 0
    found = collectives.from_first(records.read(path, Reference) if first else None)
    if found is None or found.sha256 != digest_json(found.losses):
        began = time.perf_counter()
        logger.info(
            "measuring the losses of the answers before the first step: the reference of pairs"
        )
        losses = [*measured(trainer, store, attention)]
        found = Reference(named, losses, digest_json(losses))
        if first:
            records.write(path, vars(found))
        logger.info(f"reference: {len(store):,} sequences in {time.perf_counter() - began:.1f} s")
    if known not in (None, found.sha256):
        raise UserError(
            f"reference: {path} has other losses than those with which this run began; bring the old file back, or"
            " start another run"
        )
    store.reference = [tuple(losses) for losses in found.losses]
    return found.sha256


def measured(trainer: Trainer, store: TokenStore, attention: str) -> Iterator[tuple[float, ...]]:
    objective = trainer.objective
    width = trainer.config.train.micro_batch
    store.reference = ()
    found = held_out(trainer.loss, store, objective, attention, width, each=True)
    rows = iter(found.numbers[:, -2:].tolist())  # RIGHT and WRONG
    for index in range(len(store)):
        pack = store[index]
        losses: list[float] = []
        roles = iter(pack.roles or (0,) * len(pack.segments))
        for role in roles:
            right, wrong = next(rows)
            losses.append(right)
            if role == CHOSEN:
                next(roles)
                losses.append(wrong)
        yield tuple(losses)
