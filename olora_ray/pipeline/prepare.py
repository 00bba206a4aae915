"""Preparation of a run's tokens, and the specification that its workers get."""

import logging
from collections.abc import Callable, Mapping

from olora_ray.cluster import preflight
from olora_ray.cluster.spec import TrainSpec
from olora_ray.common import storage
from olora_ray.common.errors import UserError, short_reason
from olora_ray.common.storage import digest
from olora_ray.config.schema import Config
from olora_ray.pipeline import answers
from olora_ray.pipeline.base import Base
from olora_ray.pipeline.connection import user_errors
from olora_ray.tokens import manifest
from olora_ray.tokens.prepare import StoreBuild, begin, look_here, look_there, plan_here
from olora_ray.tokens.store import TokenStore
from olora_ray.train import checkpoint

logger = logging.getLogger(__name__)

Check = Callable[[Mapping[str, str]], None]
"""Gets digests of contents by their names in `TrainSpec.identity`; raises UserError if they are not those it wants."""


def prepare_tokens(
    config: Config, base: Base, *, wait: bool = False, cpus_held: float = 0.0, check: Check = lambda contents: None
) -> tuple[TrainSpec, StoreBuild]:
    """The specification of a training, and the build of its token store.

    The store of held-out rows is complete on return. That for training may still grow, where the cluster has room
    for that beside the training: enter the build for as long as it is needed, what is not made on leaving is left
    to the next run. With `wait` both are complete. Where others hold `cpus_held` CPUs, about all, Ray is asked for
    none. `check` gets the contents once they are known, before a row is tokenised. Raises UserError for data that
    cannot be used.
    """
    start = _digest_of_start(config)
    with user_errors():
        look = look_there(config)
        build = begin(config, base.spec, "train", look)
        other = begin(config, base.spec, "eval", look) if config.data.holds_out() else None
        warn_of_both(config, build.contents(), other.contents() if other else {})
        check({"training data": build.store.digest, "held-out data": other.store.digest if other else ""})
        check({"start": start} if start else {})
        if wait:
            build.run(cpus_held)
        if other:
            other.run()
        held_out = TokenStore.open(other.store.uri) if other else None
        answers.check(config, held_out, base.tokenizer)
        if not wait and (build.complete or build.small):
            build.run()
        elif not wait:
            logger.info("tokens: train: in the making; training starts with the first shards")
            build.start(config.cluster.max_workers() * config.cluster.cpus_per_worker)
    store = TokenStore.open(build.store.uri) if wait else build.store
    again = preflight.recomputes(config, base.model)
    return TrainSpec(config, base.model, base.spec.digest, base.eos, store, held_out, start, recompute=again), build


def warn_of_both(config: Config, train: Mapping[str, str], held_out: Mapping[str, str]) -> None:
    """Say so where files of `data.eval` are files of `data.train` too; both by content."""
    if config.data.eval_fraction is None and (line := manifest.in_both(train, held_out)):
        logger.warning(line)


def contents(config: Config, base: Base) -> dict[str, str]:
    """The digests that `prepare_tokens` gives to `check`, and those of the model; without Ray.

    Raises UserError for data that cannot be used.
    """
    start, look = _digest_of_start(config), look_here(config)
    return {
        "base model": base.model.digest,
        "tokenizer": base.spec.digest,
        "training data": plan_here(config, base.spec, "train", look).digest(),
        "held-out data": plan_here(config, base.spec, "eval", look).digest() if config.data.holds_out() else "",
    } | ({"start": start} if start else {})


def _digest_of_start(config: Config) -> str | None:
    """Of the checkpoint at train.start: of its manifest, which has the digests of all its files."""
    if config.train.start is None:
        return None
    try:
        return digest(storage.read_text(storage.join(config.train.start, checkpoint.MANIFEST)), length=32)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"train.start: {config.train.start} is no checkpoint: {short_reason(error)}") from None
