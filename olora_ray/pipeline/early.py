"""The start of Ray, while this process still imports torch, transformers and MLflow."""

import contextlib
import importlib
import signal
import threading

from olora_ray.cluster import address, ray_internals
from olora_ray.config.schema import Config
from olora_ray.pipeline.run_folder import RunFolder


def begin(config: Config) -> None:
    """Join or start Ray, unless the run is finished, and meanwhile import what the run needs.

    Raises UserError if Ray does not answer, or if the run's folder belongs to another run.
    """
    folder = RunFolder(config)
    folder.check()
    if folder.finished():
        return
    importing = threading.Thread(target=_import, name="imports", daemon=True)
    importing.start()
    # Until the run handles signals itself, SIGTERM ends this process at once; Ray's handler has its own exit code.
    handler = signal.getsignal(signal.SIGTERM)
    own = address.enter() == address.OWN
    signal.signal(signal.SIGTERM, handler)
    if own:
        with contextlib.suppress(Exception):  # only saves time: Ray Train starts it if it is missing
            ray_internals.begin_autoscaling_coordinator()
    importing.join()


def _import() -> None:
    for module in ("mlflow", "olora_ray.pipeline.run"):
        importlib.import_module(module)
