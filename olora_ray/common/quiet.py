"""Turn off the noise of libraries at its source; errors stay."""

import logging
import os
import warnings
from functools import partial

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
