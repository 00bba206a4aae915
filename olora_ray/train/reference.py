"""The reference of preference pairs: the loss of each segment before the first step, measured once.

It lies beside the shards of the token store, sealed, and is named by everything that decides its bits. So the trials of
a search share one pass, and a resumed run reads what it began with.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from olora_ray.common import collectives, fault_points, records, storage
from olora_ray.common.errors import UserError
from olora_ray.common.storage import digest_json
from olora_ray.tokens.plan import CHOSEN, DOWN
from olora_ray.tokens.store import TokenStore
from olora_ray.train.held_out import Packs, held_out
from olora_ray.train.loop import Trainer

logger = logging.getLogger(__name__)
Losses = list[tuple[float, ...]]
"""The losses of the segments of each sequence."""


@dataclass(frozen=True)
class Reference:
    identity: dict[str, str]
    losses: Losses
    sha256: str
    """Digest of `losses`."""


def give(
    trainer: Trainer,
    stores: Iterable[TokenStore | None],
    attention: str,
    origin: Mapping[str, str],
    noted: dict[str, str],
) -> None:
    """Give stores their reference, from a file or by a pass with the present adapter, and note its digest.

    All workers must call it together. `origin` names base model and starting adapter; `noted` has the digests with
    which the run began, by those of the stores. Raises UserError if the losses are others.
    """
    named = dict(origin) | {
        "precision": str(next(trainer.loss.parameters()).dtype),
        "attention": attention,
        "sequences at once": str(trainer.config.train.micro_batch),
    }
    for store in stores:
        if store is not None:
            store.wait(sys.maxsize)
            measure = partial(measured, trainer, store, attention)
            found = kept(store, named, measure)
            if noted.setdefault(store.digest, found.sha256) != found.sha256:
                raise UserError(
                    f"reference: token store {store.uri} has other losses than those with which this run began; bring"
                    " its file back, or start another run"
                )
            store.reference = [tuple(losses) for losses in found.losses]


def kept(
    store: TokenStore, named: Mapping[str, str], measure: Callable[[], Iterable[tuple[float, ...]]]
) -> Reference:
    """Return the losses in the store's file of this name; without a good one, measure them and write it."""
    identity = {**named, "tokens": store.digest}
    path = storage.join(store.uri, f"reference-{digest_json(identity, length=16)}.json")
    # The workers agree on the digest only: the losses of a large store would not fit into an exchange.
    found = records.read(path, Reference)
    digest = ""
    if found and found.sha256 == digest_json(found.losses):
        digest = found.sha256
    digests = collectives.gather(digest)
    if found and set(digests) == {found.sha256}:
        return found
    began = time.perf_counter()
    logger.info("measuring the losses before the first step: the reference of preference pairs")
    losses = [*measure()]
    fault_points.reached("reference", rank=collectives.rank())
    found = Reference(identity, losses, digest_json(losses))
    if collectives.rank() == 0:
        records.write(path, vars(found))
    seconds = time.perf_counter() - began
    logger.info(f"reference: {len(store):,} sequences in {seconds:.1f} s")
    return found


def measured(trainer: Trainer, store: TokenStore, attention: str) -> Iterator[tuple[float, ...]]:
    objective = trainer.objective
    width = trainer.config.train.micro_batch
    store.reference = ()
    found = held_out(trainer.loss, store, objective, attention, width, each=True)
    return of_packs(store, found.numbers.tolist())


def of_packs(packs: Packs, numbers: Iterable[Sequence[float]]) -> Iterator[tuple[float, ...]]:
    """Yield the losses of the segments of each sequence; `numbers` has those of each example (`Objective.each`)."""
    rows = iter(numbers)
    for index in range(len(packs)):
        pack = packs[index]
        losses: list[float] = []
        roles = iter(pack.roles or (0,) * len(pack.segments))
        for role in roles:
            *_, right, wrong = next(rows)
            losses.append(wrong if role == DOWN else right)
            if role == CHOSEN:
                next(roles)
                losses.append(wrong)
        yield tuple(losses)
