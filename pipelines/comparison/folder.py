"""The folder of a comparison: its places, what it was begun with, and the code that its trainings were made with.

<storage>/<name>/
    rows/                       the three sets of rows; see rows.py
    tuning-1/ tuning-2/ ...     phases, each a folder like that of a search, with trials/trial-007/
    final/
    shared/METHOD/              factors for the tuning, and how long they took
    shared/seed-18/             what the base model does on the test rows
    compare.json                the settings and the contents that the comparison was begun with
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
"""Name of the phase that is compared."""
MIXED = (
    "its trainings were made by several versions of olora_ray or of its libraries: a difference between methods may be"
    " one between versions"
)
_BEGUN_WITH = "compare.json"
_CODE = "code.json"


def tuning_name(number: int) -> str:
    """Name of a round of the tuning, counted from 1."""
    return f"tuning-{number}"


def has_begun(root: str) -> bool:
    """True if a comparison has trials: until then its settings and rows may still be changed."""
    return storage.exists(storage.join(root, tuning_name(1)))


def shared_place(root: str, method_or_seed: str) -> str:
    """Return the folder of what trials share; `root` is the comparison's."""
    return storage.join(root, "shared", method_or_seed)


def check(comparison: Comparison) -> None:
    """Raise UserError if storage, MLflow or Ray cannot be used, or if this name is another comparison's."""
    config = comparison.config
    folder = RunFolder(config)
    folder.check()
    publish.check_tracking(config, folder)
    _refuse_other(comparison, {})
    address.find()
    if len(comparison.seeds) < SEEDS:
        logger.warning(f"--seeds {len(comparison.seeds)}: fewer than {SEEDS} say little; intervals will be wide")


def begin(comparison: Comparison, contents: Mapping[str, str]) -> None:
    """Keep what the comparison is begun with: once it has a trial, its folder is its own.

    `contents` are digests of model and rows by their names. Raises UserError if it was begun with others.
    """
    _refuse_other(comparison, contents)
    folder = comparison.config.folder()
    text = json.dumps(_description(comparison, contents), indent=1, sort_keys=True) + "\n"
    place = storage.join(folder, _BEGUN_WITH)
    if has_begun(folder) or (storage.exists(place) and storage.read_text(place) == text):
        return
    storage.remove(storage.join(folder, "shared"))  # factors of an attempt with other settings
    storage.write_text(place, text)


def _refuse_other(comparison: Comparison, contents: Mapping[str, str]) -> None:
    folder = comparison.config.folder()
    place = storage.join(folder, _BEGUN_WITH)
    if not (has_begun(folder) and storage.exists(place)):
        return
    try:
        kept = json.loads(storage.read_text(place))
        before, now = _flat(kept), _flat(_description(comparison, contents))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{place}: cannot be read; put it back, or delete {folder}") from None
    checkpoint.require_same({**contents, **kept.get("contents", {})}, contents, folder)
    if changed := [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]:
        shown = ", ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in changed[:3])
        raise UserError(
            f"run.name: {folder} holds a comparison with {plural(len(changed), 'other setting')} ({shown}): what is"
            " compared is fixed before it begins; choose another run.name, or delete the folder"
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
    """Note the code of a block that trains something; warn if earlier trainings were made with other code.

    `root` is the comparison's folder; the number that `trained` returns grows with each training.
    """
    known, now, before = _codes(root), node_cache.code(), trained()
    if now in known:
        yield
        return
    _keep_codes(root, [*known, now])  # before any training: a driver that is killed cannot do it afterwards
    try:
        yield
    finally:
        if trained() == before:
            _keep_codes(root, known)
        elif known:
            logger.warning(f"{root}: {MIXED}; choose another run.name to compare with one version")


def notes(root: str) -> tuple[str, ...]:
    """Return what a reader of the results must know."""
    return (MIXED,) if len(_codes(root)) > 1 else ()


def _codes(root: str) -> list[str]:
    place = storage.join(root, _CODE)
    if not storage.exists(place):
        return []
    try:
        return [str(each) for each in json.loads(storage.read_text(place))]
    except (ValueError, TypeError):
        return ["unknown"]


def _keep_codes(root: str, codes: list[str]) -> None:
    storage.write_text(storage.join(root, _CODE), json.dumps(codes) + "\n")
