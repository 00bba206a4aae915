"""From `model.name` to a model folder on this machine; an adapter-only version is also found as base and adapter.

    as a base of a training          the adapter is merged into its base, once, in a folder of the cache
    as a model to be measured        base and adapter, as they are

Either way the base must be, by its digest, the one that the adapter was trained on.
"""

import logging
from dataclasses import replace
from pathlib import Path

from olora_ray.adapter import plain, portable
from olora_ray.adapter.merge import write_merged
from olora_ray.common import copies, digests, local_files, storage
from olora_ray.common.errors import TryAgain, UserError, as_user_error, short_reason
from olora_ray.config.evaluation import AnyConfig
from olora_ray.config.load import override
from olora_ray.model import identity
from olora_ray.model.load import skeleton
from olora_ray.model.source import BaseModel, obtain
from olora_ray.tracking import checksums, registered
from olora_ray.tracking.contents import BaseOfAdapter
from olora_ray.tracking.registered import Registered

logger = logging.getLogger(__name__)


def find_model(config: AnyConfig, found: Registered | None = None) -> BaseModel:
    """The base model that a config names: downloaded, fetched from the registry or converted if need be.

    `found` is the version of a models:/ name, if it was looked up already: its files are not checked twice. Raises
    UserError for a name that leads nowhere, a folder that is no model, or no place to write a converted one.
    """
    with as_user_error(f"model.name: {config.model.name} cannot be prepared", OSError, reason=_place_and_reason):
        found = found or registered.of_config(config)
        return obtain(config, _folder(found, config) if found else None)


def parts(found: Registered, base: BaseOfAdapter, config: AnyConfig) -> tuple[AnyConfig, BaseModel, str]:
    """An adapter-only version as a config that names its base, that base, and a place of the adapter for all nodes.

    Raises UserError if the base is not there, or another by now.
    """
    own, model = _base(found, base, config)
    if not storage.is_uri(config.run.storage):
        return own, model, str(found.folder)
    key = digests.digest_file(found.folder / plain.WEIGHTS)[:16]
    place = storage.join(config.run.storage, "adapters", f"{found.version.name}-{found.version.number}-{key}")
    copies.upload(found.folder, place, last=plain.CONFIG)
    return own, model, place


def _folder(found: Registered, config: AnyConfig) -> Path:
    return found.folder if found.base is None else _merged(found, found.base, config)


def _base(found: Registered, base: BaseOfAdapter, config: AnyConfig) -> tuple[AnyConfig, BaseModel]:
    """The base of an adapter: where it lay when the version was registered, else wherever its name leads now."""
    own, why, passes = override(config, {"model.name": base.name, "model.revision": base.revision}), "", False
    for place in (override(config, {"model.name": base.folder, "model.revision": None}), own):
        try:
            model = find_model(place)
        except UserError as error:
            passes = isinstance(error, TryAgain)
            why = f"is not found ({str(error).removeprefix('model.name: ')})"
            continue
        if identity.same(base.digest, model.digest):
            return own, replace(model, name=base.name)
        why, passes = f"has other files than it was trained on, in {model.folder}", False
    what = f"{found.version.name} version {found.version.number} is an adapter of {base.name}, which {why}"
    raise TryAgain(what) if passes else UserError(f"{what}; put the base back where it was")


def _merged(found: Registered, base: BaseOfAdapter, config: AnyConfig) -> Path:
    """The folder of base and adapter merged; made once, and checked each time."""
    own, model = _base(found, base, config)
    content = [digests.digest_file(found.folder / name) for name in (plain.CONFIG, plain.WEIGHTS)]
    key = digests.digest(model.digest, *content, length=16)
    target = registered.cached(registered.cache(config), f"merged-{key}")
    if target.is_dir() and not _is_whole(target):
        storage.remove(str(target))
    if not target.is_dir():
        logger.info(f"model.name: merging {found.version.name} version {found.version.number} into its base, once")
        with local_files.staged(target) as folder:
            _write_merged(found, model, own, folder)
    return target / "model"


def _write_merged(found: Registered, model: BaseModel, config: AnyConfig, folder: Path) -> None:
    shape, merged = skeleton(model, config.model), folder / "model"
    adapter, scale = plain.read(found.folder, shape)
    write_merged(Path(model.folder), adapter, scale, merged, shape)
    portable.copy_tokenizer(found.folder, merged)
    (folder / checksums.FILE).write_text(checksums.of_folders({"model": merged}), encoding="utf-8")


def _is_whole(folder: Path) -> bool:
    written = folder / checksums.FILE
    found = checksums.of_folders({"model": folder / "model"})
    return written.is_file() and written.read_text(encoding="utf-8") == found


def _place_and_reason(error: BaseException) -> str:
    place = getattr(error, "filename", None)
    return f"{place}: {short_reason(error)}" if place else short_reason(error)
