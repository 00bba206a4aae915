"""Silence for Ray's libraries in one process; errors stay. What is set before Ray is imported: common/quiet.py."""

import logging

from olora_ray.cluster import ray_internals

LIBRARIES = ("ray.data", "ray.train", "ray.tune")


def quiet_ray() -> None:
    """No info lines from Ray's libraries in this process."""
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)
    ray_internals.token_logger().setLevel(logging.ERROR)


def quiet_train_worker() -> None:
    """No line for each report in this worker."""
    ray_internals.train_worker_logger().setLevel(logging.WARNING)


def quiet_ray_in_a_thread() -> None:
    """No advice that ray.init takes no signals where it runs in a thread: the driver does (pipeline/signals.py)."""
    logger = ray_internals.driver_logger()
    if _is_no_advice not in logger.filters:
        logger.addFilter(_is_no_advice)


def _is_no_advice(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("SIGTERM handler is not set")
