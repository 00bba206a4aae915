"""What each of Ray's worker processes does first; a module of its own, since every one of them imports it."""

import os

import ray


def name_this_ray() -> None:
    """Let RAY_ADDRESS name the Ray of this worker process.

    Ray Train asks the State API whether a controller lives, and takes back the workers' reservations if not. That API
    looks for a Ray on the machine: beside a second Ray it finds none, or the wrong one, in which no controller of
    ours lives.
    """
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address


NAME = f"{__name__}.{name_this_ray.__name__}"
"""For worker_process_setup_hook of a runtime environment."""
