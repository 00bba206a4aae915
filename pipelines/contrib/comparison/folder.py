"""The folder of a comparison: its files, the settings it began with, and the code versions of its trainings.

<storage>/<name>/
    rows/                            the three sets of rows; see rows.py
    tuning/ final/                   phases, each a folder like a search's
        trials/ARM-x0.5-seed17/      run folder of a training, named by arm, multiple of the arm's rate, and seed
    shared/METHOD-DIGEST/            factors of an arm for the tuning, and the time they took
    shared/seed-18/                  the base model's loss on the test rows
    compare.json                     the settings and the contents that the comparison began with
    code.json                        digests of the versions of code and libraries that trained it
    best.yaml comparison.json report.html *.png
"""

import json
import logging
from collections.abc import Mapping
from typing import Any

from comparison.arguments import SEEDS, Comparison
from olora_ray.cluster import address
from olora_ray.common import node_cache, records, storage
from olora_ray.common.errors import UserError
from olora_ray.common.storage import digest_json
from olora_ray.common.text import plural
from olora_ray.config.load import flatten
from olora_ray.config.schema import Config
from olora_ray.pipeline import publish
from olora_ray.pipeline.run_folder import RunFolder, identity_settings
from olora_ray.train import checkpoint

logger = logging.getLogger("olora_ray.comparison")

TUNING, FINAL = "tuning", "final"
MIXED = (
    "several versions of olora_ray or of its libraries trained this comparison, so a difference between arms may be"
    " a difference between versions"
)
_BEGUN_WITH = "compare.json"
_CODE = "code.json"
_ARM = "arm "


def has_begun(root: str) -> bool:
    """True if the comparison has trials; before that its settings and rows may still change."""
    return storage.exists(storage.join(root, TUNING, "trials"))


def shared_by_adapter(root: str, config: Config) -> str:
    """Return the folder of the factors that all trials of the tuning with these adapter settings share."""
    digest = digest_json(config.adapter.model_dump(mode="json"), length=8)
    return storage.join(root, "shared", f"{config.adapter.method}-{digest}")


def check(comparison: Comparison) -> None:
    """Raise UserError if storage, MLflow or Ray cannot be used, or if another comparison has this run.name."""
    config = comparison.config
    folder = RunFolder(config.folder())
    folder.check(config)
    publish.check_tracking(config, folder)
    _refuse_other(comparison, {})
    address.find()


def begin(comparison: Comparison, contents: Mapping[str, str]) -> None:
    """Write the settings and contents that the comparison begins with.

    Its first trial fixes them; only arms and seeds may be added then. `contents` are digests of model and rows by name.
    Raises UserError if the comparison began with others.
    """
    _refuse_other(comparison, contents)
    folder = comparison.config.folder()
    text = json.dumps(_description(comparison, contents), indent=1, sort_keys=True) + "\n"
    file = storage.join(folder, _BEGUN_WITH)
    if storage.exists(file) and storage.read_text(file) == text:
        return
    if not has_begun(folder):
        # An attempt with other settings may have left factors, which these settings must not reuse.
        storage.remove(storage.join(folder, "shared"))
    storage.write_text(file, text)


def _refuse_other(comparison: Comparison, contents: Mapping[str, str]) -> None:
    folder = comparison.config.folder()
    file = storage.join(folder, _BEGUN_WITH)
    if not (has_begun(folder) and storage.exists(file)):
        return
    now = _description(comparison, contents)["settings"]
    kept = records.read(file, dict[str, dict[str, Any]]) or {}
    if (before := kept.get("settings")) is None:
        raise UserError(f"{file}: cannot be read; restore it from a copy, or delete {folder}")
    checkpoint.require_same({**contents, **kept.get("contents", {})}, contents, folder)
    # More seeds and arms change no loss that is measured already.
    grown = {name for name in now if name.startswith(_ARM) and name not in before}
    grown |= {SEEDS} if before.get(SEEDS, 0) < now[SEEDS] else set()
    names = sorted((before.keys() | now.keys()) - grown)
    if changed := [name for name in names if before.get(name) != now.get(name)]:
        shown = ", ".join(
            f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in changed[:3]
        )
        raise UserError(
            f"run.name: {folder} holds a comparison with {plural(len(changed), 'other setting')} ({shown}); only more"
            f" {SEEDS} and more arms can be added; choose another run.name, or delete the folder"
        )


def _description(comparison: Comparison, contents: Mapping[str, str]) -> dict[str, Any]:
    compare = comparison.compare.model_dump(mode="json")
    settings = {
        **identity_settings(flatten(comparison.config)),
        **{f"compare.{name}": value for name, value in compare.items()},
        **{f"{_ARM}{arm.name}": dict(arm.values) for arm in comparison.arms},
        "gate.group": comparison.config.gate.group,
        "baseline": comparison.baseline.name,
        SEEDS: len(comparison.seeds),
    }
    return {"settings": settings, "contents": dict(contents)}


def note_code(root: str) -> None:
    """Note the code version of trainings that run now; warn if other versions have trained before."""
    # Before the trainings, because a driver that is killed cannot write it afterwards.
    before = _codes(root)
    if (now := node_cache.code()) not in before:
        records.write(storage.join(root, _CODE), [*before, now], indent=1, end="\n")
        if before:
            logger.warning(f"{root}: {MIXED}; choose another run.name to compare with one version")


def notes(root: str) -> tuple[str, ...]:
    return (MIXED,) if len(_codes(root)) > 1 else ()


def _codes(root: str) -> list[str]:
    return records.read(storage.join(root, _CODE), list[str]) or []
