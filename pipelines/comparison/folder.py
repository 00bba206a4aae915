"""The folder of a comparison: its files, the settings it began with, and the code versions of its trainings.

<storage>/<name>/
    rows/                       the three sets of rows; see rows.py
    tuning-1/ tuning-2/ ...     phases, each a folder like a search's, with trials/trial-007/
    final/
    shared/METHOD/              factors for the tuning, and the time they took
    shared/seed-18/             the base model's loss on the test rows
    compare.json                the settings and the contents that the comparison began with
    code.json                   digests of the code and libraries of each attempt that trained something
    comparison.json report.html *.png
"""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from comparison.arguments import SEEDS, Comparison
from olora_ray.cluster import address
from olora_ray.common import node_cache, storage
from olora_ray.common.errors import UserError
from olora_ray.common.text import plural
from olora_ray.config.load import flatten
from olora_ray.pipeline import publish
from olora_ray.pipeline.run_folder import RunFolder, bound_settings
from olora_ray.train import checkpoint

logger = logging.getLogger("olora_ray.comparison")

FINAL = "final"
MIXED = (
    "several versions of olora_ray or of its libraries trained this comparison, so a difference between methods may be"
    " a difference between versions"
)
_BEGUN_WITH = "compare.json"
_CODE = "code.json"


def tuning_name(number: int) -> str:
    return f"tuning-{number}"


def has_begun(root: str) -> bool:
    """True if the comparison has trials; before that its settings and rows may still change."""
    return storage.exists(storage.join(root, tuning_name(1)))


def shared_place(root: str, method_or_seed: str) -> str:
    return storage.join(root, "shared", method_or_seed)


def check(comparison: Comparison) -> None:
    """Raise UserError if storage, MLflow or Ray cannot be used, or if another comparison has this run.name."""
    config = comparison.config
    folder = RunFolder(config)
    folder.check()
    publish.check_tracking(config, folder)
    _refuse_other(comparison, {})
    address.find()
    if len(comparison.seeds) < SEEDS:
        logger.warning(f"--seeds {len(comparison.seeds)}: intervals will be wide; use {SEEDS} or more")


def begin(comparison: Comparison, contents: Mapping[str, str]) -> None:
    """Write the settings and contents that the comparison begins with; its first trial fixes them.

    `contents` are digests of model and rows by name. Raises UserError if the comparison began with others.
    """
    _refuse_other(comparison, contents)
    folder = comparison.config.folder()
    text = json.dumps(_description(comparison, contents), indent=1, sort_keys=True) + "\n"
    file = storage.join(folder, _BEGUN_WITH)
    if has_begun(folder) or (storage.exists(file) and storage.read_text(file) == text):
        return
    # An attempt with other settings may have left factors, which these settings must not reuse.
    storage.remove(storage.join(folder, "shared"))
    storage.write_text(file, text)


def _refuse_other(comparison: Comparison, contents: Mapping[str, str]) -> None:
    folder = comparison.config.folder()
    file = storage.join(folder, _BEGUN_WITH)
    if not (has_begun(folder) and storage.exists(file)):
        return
    try:
        kept = json.loads(storage.read_text(file))
        before, now = _flat(kept), _flat(_description(comparison, contents))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{file}: cannot be read; restore it from a copy, or delete {folder}") from None
    checkpoint.require_same({**contents, **kept.get("contents", {})}, contents, folder)
    if changed := [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]:
        shown = ", ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in changed[:3])
        raise UserError(
            f"run.name: {folder} holds a comparison with {plural(len(changed), 'other setting')} ({shown});"
            " choose another run.name, or delete the folder"
        )


def _description(comparison: Comparison, contents: Mapping[str, str]) -> dict[str, Any]:
    settings = bound_settings(flatten(comparison.config))
    fixed = {f"compare.{name}": value for name, value in comparison.compare.model_dump().items()}
    group = {"gate.group": comparison.config.gate.group}
    named = {"--methods": list(comparison.methods), "--seeds": len(comparison.seeds)}
    return {"settings": {**settings, **fixed, **group, **named}, "contents": dict(contents)}


def _flat(description: Mapping[str, Any]) -> dict[str, Any]:
    return dict(description["settings"])


@contextlib.contextmanager
def noted(root: str, trained: Callable[[], int]) -> Iterator[None]:
    """Note the code version of a block that trains; warn if other versions have trained before.

    `root` is the comparison's folder; `trained` returns a number that grows with each training.
    """
    known, now, before = _codes(root), node_cache.code(), trained()
    if now in known:
        yield
        return
    # Written before any training, because a driver that is killed cannot write it afterwards.
    _keep_codes(root, [*known, now])
    try:
        yield
    finally:
        if trained() == before:
            _keep_codes(root, known)
        elif known:
            logger.warning(f"{root}: {MIXED}; choose another run.name to compare with one version")


def notes(root: str) -> tuple[str, ...]:
    return (MIXED,) if len(_codes(root)) > 1 else ()


def _codes(root: str) -> list[str]:
    file = storage.join(root, _CODE)
    if not storage.exists(file):
        return []
    try:
        return [str(each) for each in json.loads(storage.read_text(file))]
    except (ValueError, TypeError):
        return ["unknown"]


def _keep_codes(root: str, codes: list[str]) -> None:
    storage.write_text(storage.join(root, _CODE), json.dumps(codes) + "\n")
