"""Preparation of a run's tokens, and the specification that its workers get."""

import logging

from olora_ray.cluster.spec import TrainSpec
from olora_ray.config.schema import Config
from olora_ray.pipeline import answers
from olora_ray.pipeline.base import Base
from olora_ray.pipeline.connection import user_errors
from olora_ray.tokens.prepare import StoreBuild, begin, prepare
from olora_ray.tokens.store import TokenStore

logger = logging.getLogger(__name__)


def prepare_tokens(
    config: Config, base: Base, *, wait: bool = False, cpus_held: float = 0.0
) -> tuple[TrainSpec, StoreBuild]:
    """The specification of a training, and the build of its token store.

    The store of held-out rows is complete on return. That for training may still grow, where the cluster has room
    for that beside the training: enter the build for as long as it is needed, what is not made on leaving is left
    to the next run. With `wait` both are complete. Where others hold `cpus_held` CPUs, about all, Ray is asked for
    none. Raises UserError for data that cannot be used.
    """
    with user_errors():
        build = begin(config, base.spec, "train")
        if wait:
            build.run(cpus_held)
        held_out = prepare(config, base.spec, "eval") if config.data.holds_out() else None
        answers.check(config, held_out, base.tokenizer)
        if not wait and (build.complete or build.small):
            build.run()
        elif not wait:
            logger.info("tokens: train: in the making; training starts with the first shards")
            build.start(config.cluster.max_workers() * config.cluster.cpus_per_worker)
    store = TokenStore.open(build.store.uri) if wait else build.store
    return TrainSpec(config, base.model, base.spec.digest, base.eos, store, held_out), build
