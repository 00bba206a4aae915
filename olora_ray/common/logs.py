"""Log lines for users: the time of day and the message, with *** instead of secrets.

Modules write to `logging.getLogger(__name__)`. Each process decides once where its lines go: an entry script prints
them (`printed`), a training worker sends them to its driver, and a trial of a search keeps them in a file
(`handled_by`).
"""

import contextlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from olora_ray.common.secrets import mask
from olora_ray.common.text import paragraph

PACKAGE = "olora_ray"


def line(record: logging.LogRecord) -> str:
    """Return a record's message without secrets, after `warning: ` or `error: ` if its level is above INFO."""
    message = record.getMessage()
    if record.levelno >= logging.WARNING:
        message = f"{record.levelname.lower()}: {message}"
    return mask(message)


class LineFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{self.formatTime(record, '%H:%M:%S')} {line(record)}"


class _Printer(logging.StreamHandler):  # type: ignore[type-arg]
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def emit(self, record: logging.LogRecord) -> None:
        with _Printer.around():
            super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if hasattr(record, "copied"):  # a wrapped command could not be copied
            return text
        # On a terminal, below the message and not below the time of day.
        lines = text.split("\n")
        return "\n".join(paragraph(each, 9) for each in lines)

    def handleError(self, record: logging.LogRecord) -> None:
        # After `python ... | head` every line fails. Raising in the main thread ends the script, instead of a traceback
        # per line on stderr. Other threads drop the line: the main thread meets the same problem at its next line.
        if threading.current_thread() is threading.main_thread():
            raise


@contextlib.contextmanager
def handled_by(handler: logging.Handler) -> Iterator[None]:
    """Send the package's lines, from INFO on, to this handler during the block, and not to the root logger's."""
    handler.setFormatter(LineFormatter())
    logger = logging.getLogger(PACKAGE)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        # Several trainings may share a process, and each has its own.
        logger.propagate = not logger.handlers
        handler.close()


@contextlib.contextmanager
def printed_within(context: Callable[[], contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
    """Print each line inside a `context()`, for example one that hides a progress bar meanwhile."""
    _Printer.around = staticmethod(context)
    try:
        yield
    finally:
        _Printer.around = contextlib.nullcontext


@contextlib.contextmanager
def printed() -> Iterator[None]:
    with handled_by(_Printer(sys.stdout)):
        yield


# Libraries' progress bars and advice are turned off where they arise. Errors stay.


ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # with it each print appears twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # the driver looks for preempted nodes itself
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's tables, which `verbose=0` does not turn off
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # With several AMD GPUs Ray would hide all but one from a worker, and Train would take the number of it among all.
    "RAY_EXPERIMENTAL_NOSET_HIP_VISIBLE_DEVICES": "1",
}
"""Environment variables of the driver, set before Ray is imported, and of all workers."""


def quiet_environment() -> None:
    """Set the environment variables that Ray and the hub's client read when they are imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    quiet_bitsandbytes()
    # Notice a dead worker after 1 s instead of 2 s.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    # If workers have not started after 30 s, Ray chooses nodes again: one of the chosen nodes may be gone.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")
    # A busy machine needs more than 30 s to start Ray's control store, and more than 10 s to start a node.
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "60")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "60")


def quiet_transformers() -> None:
    from transformers.utils import logging as transformers_logging

    quiet_bitsandbytes()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    # PEFT uses the old name of the property; a user can do nothing about that.
    warnings.filterwarnings(
        "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
    )


def quiet_bitsandbytes() -> None:
    # At its import, bitsandbytes searches the hub for a kernel, and logs that; offline, the package kernels logs it.
    # PEFT imports bitsandbytes if it is installed, and transformers 5.25 brings kernels.
    for name in ("bitsandbytes.backends.cpu.ops", "kernels._internals.hf_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
