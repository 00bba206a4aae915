"""Connection of a driver to Ray: connects, checks that the run can work there, and disconnects."""

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayTaskError

from olora_ray.cluster import address, preflight
from olora_ray.cluster.quiet import quiet_ray
from olora_ray.common.errors import UserError
from olora_ray.common.quiet import ENVIRONMENT
from olora_ray.config.evaluation import AnyConfig
from olora_ray.model.source import BaseModel
from olora_ray.pipeline.signals import Stop

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def connect(config: AnyConfig, base: BaseModel | None = None) -> Iterator[Stop]:
    """A connection to the cluster of RAY_ADDRESS or of this machine, or to a new local Ray.

    Yields what takes the signals meanwhile. Raises UserError if it does not answer or the run cannot work there;
    with `base`, its memory and the disk are looked at too. On leaving, the connection is closed,
    and a local Ray with it.
    """
    quiet_ray()
    shared: dict[str, Any] = {"logging_level": logging.WARNING, "runtime_env": {"env_vars": ENVIRONMENT}}
    if (found := address.find()) == "local":
        # Ray Train frees the resources of a stopped run through the dashboard's State API. The dashboard can
        # start jobs, so it must answer this machine only.
        shared["dashboard_host"] = "127.0.0.1"
    ray.init(address=found, **shared)
    try:
        with Stop() as stop:  # after ray.init, which sets a handler of its own
            resources = ray.cluster_resources()
            logger.info(
                f"ray: {resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs, {len(ray.nodes())} node(s)"
            )
            preflight.check(config, base)
            yield stop
    except BaseException:
        # Give Ray Data's prefetch threads time to end: one that calls Ray after shutdown kills the process
        # silently, and the real error with it.
        time.sleep(1)
        raise
    finally:
        ray.shutdown()


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Raise the UserError that a Ray task raised as itself, not wrapped."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise
