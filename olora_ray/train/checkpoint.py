"""Checkpoint: the state of a training as a folder of safetensors and JSON, without pickles.

    adapter.safetensors      a0, b0, da, db of every layer, float32
    best.safetensors         da, db of the best step so far, if that is an earlier step
    optimizer.safetensors    the optimizer's moments
    state.json               step, best, history, identity of base, data and adapter
    config.yaml              the config of the run
    manifest.json            size and SHA-256 of all other files, written last

A folder is a checkpoint only if it has a manifest, and all files have the size and SHA-256 in it.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from olora_ray.adapter.layer import AdapterWeights, Factors
from olora_ray.common import records, storage
from olora_ray.common.errors import UserError, first_line
from olora_ray.common.fault_points import reached
from olora_ray.model import folder as model_identity

# State of a run: all that a resume needs beside the tensors of adapter and optimizer.


@dataclass
class TrainState:
    """Progress of a run.

    The data cursor is `step` alone: global step k reads sequences [k G, (k + 1) G) of the order. Random
    numbers (dropout) are seeded again from (seed, step, micro-batch) for each micro-batch, so there is no
    generator state to keep.
    """

    # A field of another version is an error, because the numbers may depend on it.
    __pydantic_config__ = ConfigDict(extra="forbid")

    step: int = 0
    """Optimizer steps done."""
    best_loss: float | None = None
    best_step: int | None = None
    """Step at which `best_loss` was measured."""
    stale: int = 0
    """Number of evaluations since `best_step`."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Every metric logged so far: one row per step, with `step` as a column."""
    kinds: list[dict[str, str]] = field(default_factory=list)
    """Hardware and software of the workers that trained last (cluster/worker_context.py)."""
    lr: float | None = None
    """The automatic learning rate, measured before step 0, also where train.lr is a number; None if it was not."""
    lr_steps: int | None = None
    """Number of steps for which `lr` was made; None in a checkpoint of an older version."""
    precision: str | None = None
    """Precision of the base by torch's name: the meaning of `model.dtype: auto` when the run started."""
    self_test: dict[str, Any] | None = None
    """Result of the model's self-test, and its inputs (cluster/start.py)."""
    examples: list[float] | None = None
    """Loss of each held-out example at the last evaluation; None unless `TrainSpec.each_example`."""
    before: list[list[int]] | None = None
    """Answers to held-out prompts before training, as token ids; None until they are generated."""

    reference: dict[str, str] = field(default_factory=dict)
    """Digest of a token store -> digest of its losses before the first step, with which the run began (pairs only)."""
    rung: dict[str, int | str | bool] = field(default_factory=dict)
    """Dotted field -> value of what was tried on the workers' GPUs (cluster/ladder.py); empty if nothing was."""
    shrunk: float | None = None
    """Factor by which a retraining has scaled the change of another run: this one is measured, and never trained."""

    def record(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        row = {"step": float(step), **metrics}
        self.history.append(row)
        return row

    def note_evaluation(self, loss: float) -> bool:
        """Record a held-out loss; return True if it is the best so far, which a loss that is not finite never is."""
        best = math.inf if self.best_loss is None or math.isnan(self.best_loss) else self.best_loss
        if loss < best:
            self.best_loss = loss
            self.best_step = self.step
            self.stale = 0
            return True
        self.stale += 1
        return False


FORMAT = 1
ADAPTER = "adapter.safetensors"
BEST = "best.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
CONFIG = "config.yaml"
MANIFEST = "manifest.json"

_NAMES = {ADAPTER, BEST, OPTIMIZER, STATE, CONFIG}


@dataclass(kw_only=True)
class _StateFile(TrainState):
    format: int
    identity: dict[str, str]


@dataclass(frozen=True)
class File:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    format: int
    files: dict[str, File]

    @classmethod
    def of(cls, folder: str) -> "Manifest | None":
        """Return the manifest of a checkpoint (path or URI); None if it is missing or damaged. Raises OSError."""
        return records.read(storage.join(folder, MANIFEST), cls)


@dataclass(frozen=True)
class Checkpoint:
    adapter: dict[str, AdapterWeights]
    best: dict[str, Tensor] | None
    """`NAME.da` and `NAME.db` of the best step so far; None if it is this step, or nothing was evaluated."""
    optimizer: dict[str, Tensor]
    state: TrainState
    identity: dict[str, str]
    """Digests of base model, tokenizer, data and adapter; a run resumes only if they are the same."""

    def best_adapter(self) -> dict[str, AdapterWeights]:
        if self.best is None:
            return self.adapter
        return {
            name: AdapterWeights(weights.factors, self.best[f"{name}.da"], self.best[f"{name}.db"])
            for name, weights in self.adapter.items()
        }


def save(
    folder: Path,
    adapter: Mapping[str, AdapterWeights],
    best: Mapping[str, Tensor] | None,
    optimizer: Mapping[str, Tensor],
    state: TrainState,
    identity: Mapping[str, str],
    config_yaml: str,
) -> None:
    """Write a complete checkpoint into an empty folder, and flush it to the disk.

    All tensors must be on the CPU. Raises OSError or SafetensorError if a file cannot be written; the folder then has
    no manifest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_tensors(adapter), folder / ADAPTER)
    reached("checkpoint", state.step)
    save_file(dict(optimizer), folder / OPTIMIZER)
    if best is not None:
        save_file(dict(best), folder / BEST)
    (folder / STATE).write_text(
        json.dumps({"format": FORMAT, "identity": dict(identity), **vars(state)})
    )
    (folder / CONFIG).write_text(config_yaml, encoding="utf-8")
    files = {file.name: _fingerprint(file) for file in sorted(folder.iterdir())}
    for name in files:
        _publish(folder / name)
    (folder / MANIFEST).write_text(records.text_of(Manifest(FORMAT, files), indent=1))
    _publish(folder / MANIFEST)


def load(folder: Path) -> Checkpoint:
    """Read and verify a checkpoint; raises UserError with the name of the file that is wrong."""
    problem = damage(folder)
    if problem:
        raise UserError(problem)
    kept = records.read(str(folder / STATE), _StateFile)
    if kept is None:
        raise UserError(
            f"checkpoint {folder}: cannot be loaded: {STATE} is damaged, or of another version"
        )
    state = TrainState(**{each.name: getattr(kept, each.name) for each in fields(TrainState)})
    try:
        best = load_file(folder / BEST) if (folder / BEST).exists() else None
        parts = load_file(folder / ADAPTER)
        adapter = {}
        for key in parts:
            if key.endswith(".da"):
                name = key.removesuffix(".da")
                factors = Factors(parts[f"{name}.a0"], parts.get(f"{name}.b0"))
                adapter[name] = AdapterWeights(factors, parts[key], parts[f"{name}.db"])
        optimizer = load_file(folder / OPTIMIZER)
        loaded = Checkpoint(adapter, best, optimizer, state, kept.identity)
        loaded.best_adapter()  # KeyError if a layer is missing in BEST
        return loaded
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"checkpoint {folder}: cannot be loaded: {first_line(error)}") from None


def require_same(saved: Mapping[str, str], wanted: Mapping[str, str], where: str) -> None:
    """Raise UserError if another model, data, adapter or optimizer is `wanted` than a checkpoint has (`saved`)."""
    # Older checkpoints know no other optimizer, and an identity names no objective but others than `tokens`.
    saved = {"optimizer": "adamw", "objective": "tokens", **saved}
    wanted = {"objective": "tokens", **wanted}
    changed = [part for part in wanted if saved.get(part) != wanted[part]]
    # Another tokenizer makes other tokens, so the digest of the data differs too. Only the cause is reported.
    if "tokenizer" in changed:
        changed = [part for part in changed if not part.endswith("data")]
    if changed:
        shown = "; ".join(
            f"another {part} ({_difference(saved.get(part, ''), wanted[part])})" for part in changed
        )
        raise UserError(
            f"run.name: {where} was trained with {shown}; set another run.name, or undo the change"
        )


def _difference(old: str, new: str) -> str:
    before, now = (records.parsed(each, dict[str, Any]) for each in (old, new))
    if before is not None and now is not None:  # of the adapter; all others are digests
        changed = sorted(
            key for key in before.keys() | now.keys() if before.get(key) != now.get(key)
        )
        return ", ".join(
            f"{key} was {before.get(key)!r}, is now {now.get(key)!r}" for key in changed
        )
    if old and model_identity.weights(old) == model_identity.weights(new):
        return "same weights, but its config.json, tokenizer or another file has changed"
    return f"was {old[:12] or 'none'}, is now {new[:12] or 'none'}"


def damage(folder: Path) -> str:
    """Return why the folder is no complete checkpoint with the bytes that were written; empty if it is one.

    Raises OSError if the storage cannot read a file now; the checkpoint may still be good.
    """
    manifest = Manifest.of(str(folder))
    if manifest is None:
        return f"{folder}: not a complete checkpoint ({MANIFEST} is missing or damaged)"
    files = manifest.files
    complete = manifest.format == FORMAT and files.keys() >= {ADAPTER, OPTIMIZER, STATE, CONFIG}
    if not complete or files.keys() - _NAMES or ((folder / BEST).exists() and BEST not in files):
        return f"{folder / MANIFEST}: does not fit this folder, or comes from another version of olora_ray"
    for name, expected in files.items():
        if not (folder / name).is_file() or _fingerprint(folder / name) != expected:
            return f"checkpoint {folder}: {name} is missing or damaged"
    return ""


def _tensors(adapter: Mapping[str, AdapterWeights]) -> dict[str, Tensor]:
    parts: dict[str, Tensor] = {}
    for name, weights in adapter.items():
        parts[f"{name}.a0"] = weights.factors.a0
        parts[f"{name}.da"] = weights.da
        parts[f"{name}.db"] = weights.db
        if weights.factors.b0 is not None:
            parts[f"{name}.b0"] = weights.factors.b0
    return parts


def _publish(file: Path) -> None:
    # Another user may resume or export the run from a shared storage, and the disk must have all files before the
    # manifest, which says that they are complete.
    storage.open_up(file)
    storage.flush_to_disk(file)


def _fingerprint(file: Path) -> File:
    return File(file.stat().st_size, storage.digest_file(file))
