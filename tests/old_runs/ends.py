"""What a run or a search is in the end, as plain values; and how two ends differ, on this machine or on another."""

import hashlib
import importlib.metadata
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.golden import without_varying
from tests.recovery.runs import REPEATABLE

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "safetensors", "peft")
"""Packages whose version may change bytes of an export."""
FILES = (
    "export/adapter/adapter_model.safetensors",
    "export/adapter/adapter_config.json",
    "export/merged/model.safetensors",
)
RESULT = (
    "steps",
    "best_step",
    "automatic_lr",
    "metrics",
    "eval_loss_before",
    "scores",
    "data",
    "registered",
)
"""Parts of result.json that are no time, no address and no rounding error."""
TRIAL = ("number", "params", "status", "value", "step", "total", "curve")
CANARY = """
import hashlib, sys, torch
from transformers import AutoModelForCausalLM
for dtype in (torch.float32, torch.bfloat16):
    digest = hashlib.sha256()
    loaded = {"dtype": dtype, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **loaded)
    model(input_ids=(ids := torch.arange(256).reshape(4, 64)), labels=ids).loss.backward()
    for weight in model.parameters():
        digest.update(weight.grad.float().numpy().tobytes())
    print(digest.hexdigest())
"""
"""Gradients of a model by transformers alone: they tell how this machine rounds, whatever this project does."""


def machine(model: Path) -> dict[str, str]:
    """Versions of packages, and the digests of CANARY: equal on two machines that compute the same bytes."""
    done = subprocess.run(
        [sys.executable, "-c", CANARY, str(model)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    float32, bfloat16 = done.stdout.split()
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {**versions, "float32": float32, "bfloat16": bfloat16}


def of_run(storage: Path, name: str) -> dict[str, Any]:
    """Digests of the exports, result.json, and MLflow's series of losses and rates."""
    folder = storage / name
    result = without_varying(json.loads((folder / "result.json").read_text()))
    return {
        "files": {file: _digest(folder / file, storage.parent) for file in FILES},
        "result": {part: result[part] for part in RESULT},
        "series": series(storage, name),
    }


def of_search(storage: Path, name: str) -> dict[str, Any]:
    """What the leaderboard says of each trial, without times and addresses."""
    board = json.loads((storage / name / "leaderboard.json").read_text())
    return {
        "metric": board["metric"],
        "trials": [{part: trial[part] for part in TRIAL} for trial in board["trials"]],
    }


def differences(found: Any, wanted: Any, tolerance: float, at: str = "") -> Iterator[str]:
    """Name each value of `wanted` that `found` lacks or has differently; `found` may have more.

    With a tolerance of 0 everything is equal. Else numbers differ by at most this share, and digests of files are not
    compared.
    """
    if isinstance(wanted, dict):
        for key, value in wanted.items():
            if not isinstance(found, dict) or key not in found:
                yield f"{at}/{key}: missing"
            elif at != "/files" or tolerance == 0:
                yield from differences(found[key], value, tolerance, f"{at}/{key}")
    elif isinstance(wanted, list) and isinstance(found, list) and len(found) == len(wanted):
        for number, value in enumerate(wanted):
            yield from differences(found[number], value, tolerance, f"{at}/{number}")
    elif not _equal(found, wanted, tolerance):
        yield f"{at}: {found!r}, not {wanted!r}"


def _equal(found: Any, wanted: Any, tolerance: float) -> bool:
    if isinstance(wanted, float) and isinstance(found, float):
        return math.isclose(found, wanted, rel_tol=tolerance)
    return bool(found == wanted)


def _digest(file: Path, place: Path) -> str:
    content = file.read_bytes().replace(os.fsencode(place), b"PLACE")
    return hashlib.sha256(content).hexdigest()


def series(storage: Path, name: str) -> dict[str, list[list[float]]]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name("olora")
    wanted = f"tags.mlflow.runName = '{name}'"
    (run,) = client.search_runs([experiment.experiment_id], wanted)
    found = {}
    for metric in sorted(REPEATABLE & run.data.metrics.keys()):
        points = client.get_metric_history(run.info.run_id, metric)
        found[metric] = sorted([float(point.step), point.value] for point in points)
    return found
