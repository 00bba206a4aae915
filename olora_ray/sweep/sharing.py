"""The shared work of a search as a task in the place of one worker, with a line a minute while it lasts."""

import logging
import time
from collections.abc import Sequence

import ray

from olora_ray.cluster.resources import worker_resources
from olora_ray.cluster.spec import TrainSpec
from olora_ray.common.text import duration
from olora_ray.pipeline import connection
from olora_ray.sweep import shared_work
from olora_ray.sweep.shared_work import Kind, Shared

logger = logging.getLogger(__name__)

STILL = 60.0
"""Seconds from one line to the next."""


def made(spec: TrainSpec, place: str, wanted: Sequence[Kind], what: str) -> Shared:
    """`shared_work.make` on the cluster; `what` it is, for the log. Raises UserError as it does."""
    resources = worker_resources(spec.config)
    make = ray.remote(shared_work.make).options(num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0))
    began = time.monotonic()
    task = make.remote(spec, place, wanted)
    while not ray.wait([task], timeout=STILL)[0]:
        logger.info(f"{what}: {duration(time.monotonic() - began)} so far")
    with connection.user_errors():
        found: Shared = ray.get(task)
    for line in found.told:
        logger.info(line)
    return found
