"""Resolver of the places that a config names: paths, URIs, hub ids, package:// files."""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from olora_ray.common.errors import UserError, as_user_error, short_reason
from olora_ray.common.storage import is_uri
from olora_ray.config.evaluation import AnyConfig
from olora_ray.config.schema import AnySection, Source

Resolved = TypeVar("Resolved", bound=AnyConfig)

JOB_FOLDER = "runtime_resources"
"""Part of the path under which Ray unpacks a submitted job's working directory."""


def resolved(config: Resolved, folder: Path) -> Resolved:
    """The config with every relative path made absolute, seen from `folder`.

    Workers run elsewhere, so nothing relative may reach them. A job's own working directory is
    deleted after the job: a relative `run.storage` then lies under the home directory instead. Raises UserError for
    a place at which this user cannot look, or in a home folder that there is not.
    """
    name = config.model.name
    # With the home directory in the place of ~: what is exported names the base by a path that others can read.
    if not is_uri(name) and is_there(place := Path(left(name, folder, "model.name")), "model.name"):
        name = str(place)
    start = config.train.start
    return _changed(
        config,
        run=_changed(config.run, storage=absolute(config.run.storage, lasting(folder), "run.storage")),
        model=_changed(config.model, name=name),
        data=_changed(
            config.data,
            train=_sources(config.data.train, folder, "data.train"),
            eval=_sources(config.data.eval, folder, "data.eval"),
        ),
        train=_changed(config.train, start=start and left(start, folder, "train.start")),
    )


def is_there(place: Path, field: str) -> bool:
    """Whether something lies at a path; raises UserError that names `field` where this user cannot look."""
    with as_user_error(f"{field}: {place}", OSError, reason=short_reason):
        return place.exists()


def lasting(folder: Path) -> Path:
    """Where what is written to a relative place lies, seen from `folder`: a job's own folder is deleted after it."""
    return Path.home() / "olora_ray" if JOB_FOLDER in folder.parts else folder


def _changed(section: AnySection, **values: object) -> AnySection:
    return section.model_copy(update=values)


def absolute(place: str, folder: Path, field: str = "") -> str:
    """`place` itself if it is a URI, else as an absolute path seen from `folder`; raises UserError as `at_home`."""
    return place if is_uri(place) else os.path.normpath(folder / at_home(place, field))


def left(place: str, folder: Path, field: str = "") -> str:
    """As `absolute`; in a job, of what is not in its own folder, the place where jobs before it have left theirs."""
    found = absolute(place, folder, field)
    kept = absolute(place, lasting(folder), field)
    return kept if os.path.exists(kept) and not os.path.lexists(found) else found


def at_home(place: str, field: str = "") -> Path:
    """A path with a home folder in the place of its `~`; raises UserError, that names `field`, if there is none."""
    try:
        return Path(place).expanduser()
    except RuntimeError:
        where = f"{field}: {place}" if field else place
        raise UserError(f"{where}: there is no home folder for '{Path(place).parts[0]}'; write it out") from None


def package_file(name: str, field: str = "model.name") -> Path:
    """The path of package://PACKAGE/FILE; raises UserError that names `field` if either is not there."""
    package, _, inner = name.removeprefix("package://").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{field}: {name}: Python package {package!r} is not installed")
    path = Path(next(iter(spec.submodule_search_locations))) / inner
    if not path.exists():
        there = sorted(item.name for item in path.parent.glob("*")) if path.parent.is_dir() else []
        raise UserError(f"{field}: {name}: no such file in the package; there is {', '.join(there) or 'nothing'}")
    return path


def _sources(sources: Sequence[Source], folder: Path, setting: str) -> tuple[Source, ...]:
    return tuple(_source(source, folder, f"{setting}.{number}") for number, source in enumerate(sources))


def _source(source: Source, folder: Path, where: str) -> Source:
    only = tuple(absolute(name, folder, f"{where}.only") for name in source.only)
    return _changed(source, path=absolute(source.path, folder, f"{where}.path"), only=only)
