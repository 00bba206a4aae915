"""Log lines for people: the time of day, the message, and *** in place of secrets.

Modules write to `logging.getLogger(__name__)`. Where the lines go is decided once per process: an entry script
prints them (`printed`), a training worker sends them to its driver, a trial of a search keeps them in a file
(`handled_by`).
"""

import contextlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from olora_ray.common.secrets import mask

PACKAGE = "olora_ray"
_guard, _handlers = threading.Lock(), list[logging.Handler]()
"""Those in use: several trainings may share a process."""
_before: dict[str, Any] = {}
"""The logger's settings before the first of them."""


def line(record: logging.LogRecord) -> str:
    """The message of a record without secrets; `warning: ` or `error: ` goes before what is more than information."""
    prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
    return mask(prefix + record.getMessage())


class LineFormatter(logging.Formatter):
    """`HH:MM:SS message`."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        return f"{self.formatTime(record, '%H:%M:%S')} {line(record)}"


class _Printer(logging.StreamHandler):  # type: ignore[type-arg]
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record, beside whatever else is on the terminal."""
        with _Printer.around():
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise what went wrong in the main thread: `python ... | head` ends the script instead of filling stderr.

        Other threads lose the line and live on: the main thread meets the same problem at its next line.
        """
        if threading.current_thread() is threading.main_thread():
            raise


@contextlib.contextmanager
def handled_by(handler: logging.Handler) -> Iterator[None]:
    """Let the package's lines, from INFO on, go to this handler and, while it is there, to no handler of others."""
    logger = logging.getLogger(PACKAGE)
    with _guard:
        if not _handlers:
            _before.update(level=logger.level, propagate=logger.propagate)
        _handlers.append(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(handler)
    try:
        yield
    finally:
        with _guard:
            _handlers.remove(handler)
            # A new list: another thread may be going through the old one.
            logger.handlers = [each for each in logger.handlers if each is not handler]
            if not _handlers:
                logger.setLevel(_before["level"])
                logger.propagate = _before["propagate"]
        handler.close()


@contextlib.contextmanager
def printed_within(context: Callable[[], contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
    """Print each line inside a `context()`, which takes a progress bar off the terminal, say, and puts it back."""
    _Printer.around = staticmethod(context)
    try:
        yield
    finally:
        _Printer.around = contextlib.nullcontext


@contextlib.contextmanager
def printed() -> Iterator[None]:
    """Print the package's lines to stdout, a job's log."""
    handler = _Printer(sys.stdout)
    handler.setFormatter(LineFormatter())
    with handled_by(handler):
        yield


# Turn off the noise of libraries at its source; errors stay.


ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # each print would appear twice
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's tables, which `verbose=0` does not turn off
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Set before Ray is imported in the driver, and sent to all workers."""


def quiet_environment() -> None:
    """Set the variables that Ray and the hub client read when they are imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    quiet_bitsandbytes()
    # How soon a dead worker is noticed: 2 s by default.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    # How long new workers may take to appear before the cluster is looked at again: a node may have gone.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")


def quiet_transformers() -> None:
    """No loading bars and no advice from transformers in this process."""
    from transformers.utils import logging as transformers_logging

    quiet_bitsandbytes()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    # PEFT asks for it by its old name.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def quiet_bitsandbytes() -> None:
    """No word of a kernel that it looks for on the hub when it is imported; PEFT imports it wherever it is there."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def quiet_gguf() -> None:
    """No bar for the conversion of a GGUF file in a log: transformers takes tqdm as it is there."""
    from tqdm import tqdm
    from transformers import modeling_gguf_pytorch_utils

    vars(modeling_gguf_pytorch_utils)["tqdm"] = partial(tqdm, disable=None)  # None: only on a terminal


def quiet_lm_eval() -> None:
    """No bars and no advice from lm-eval and datasets in this process."""
    import datasets
    from lm_eval.api import task
    from tqdm import tqdm

    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    vars(task)["tqdm"] = partial(tqdm, disable=None)
