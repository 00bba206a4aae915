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
