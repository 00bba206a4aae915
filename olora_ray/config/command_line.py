"""The command line of the entry scripts: arguments, log lines, exit codes."""

import difflib
import gc
import importlib.util
import io
import json
import logging
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from olora_ray.common import logs
from olora_ray.common.errors import Stopped, StoreError, UserError, as_user_error, of_the_machine, short_reason
from olora_ray.common.secrets import mask
from olora_ray.common.storage import is_uri
from olora_ray.config.load import load, meant, parse_assignments, spelling_advice
from olora_ray.config.schema import AnyConfig, Condition, Config, Data, Source
from olora_ray.config.section import AnySection, Section

# The schema in words: what a field may hold, its default as it stands in a config, and the fields for --help.


NAMES = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`", NoneType: "`null`"}
BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
WIDTH = 112
"""Columns of --help."""


def name_of(section: type[Section]) -> str:
    """The name of a section that is an entry of a list, as `source`."""
    return section.__name__.lower()


def shape(annotation: Any, limits: Sequence[Any] = (), entry: Callable[[type[Section]], str] = name_of) -> str:
    """Say in words what a field may hold; `limits` are pydantic's constraints, `entry` names a section."""
    kind, inner = get_origin(annotation), get_args(annotation)
    if kind is Annotated:
        found = [limit for one in inner[1:] for limit in (one.metadata if isinstance(one, FieldInfo) else [one])]
        return shape(inner[0], [*limits, *found], entry)
    if kind in (Union, UnionType):
        return " or ".join(shape(part, (), entry) for part in inner)
    if kind is Literal:
        return ", ".join(f"`{choice}`" for choice in inner)
    if kind is tuple:
        return _tuple([shape(part, (), entry) for part in inner if part is not Ellipsis], Ellipsis in inner, limits)
    if kind is dict:
        return f"mapping of {shape(inner[0], (), entry)} to {shape(inner[1], (), entry)}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return entry(annotation)
    return " ".join([NAMES[annotation], *_bounds(limits)])


def plain(value: Any) -> str:
    """A default as it would stand in a config."""
    return value if isinstance(value, str) else json.dumps(value, default=list)


def default(field: FieldInfo) -> str:
    """A field's default as it would stand in a config, or `required`."""
    return "required" if field.is_required() else plain(field.get_default(call_default_factory=True))


FIRST = (
    *("run.name", "model.name", "data.train", "data.eval", "data.max_length", "adapter.rank", "adapter.alpha"),
    *("train.epochs", "train.global_batch", "train.micro_batch", "train.lr"),
    *("cluster.workers", "tracking.uri", "registry.model"),
)
"""The fields that a first run sets: those of --help."""


def help_text(config: type[Section] = Config, only: Collection[str] | None = None) -> str:
    """The fields of a config with what they may hold, their defaults and docstrings, by section.

    `only`: these, as section.field, and all of a section that a command adds to a run's; None: all.
    """
    lines = []
    for name, field in config.model_fields.items():
        section = field.annotation
        assert isinstance(section, type)
        assert issubclass(section, Section)
        whole = only is None or name not in Config.model_fields
        shown = None if whole else [each for each in section.model_fields if f"{name}.{each}" in (only or ())]
        if shown != []:
            lines.append(f"{name}:")
            lines.extend(_section(section, "  ", shown))
    return "\n".join(lines)


def _section(section: type[Section], indent: str, only: Collection[str] | None = None) -> Iterator[str]:
    for name, field in section.model_fields.items():
        if only is not None and name not in only:
            continue
        kind = shape(field.annotation, field.metadata).replace("`", "")
        text = " ".join(f"{field.description} ({kind}) [{default(field)}]".split())
        start = f"{indent}{field.alias or name:<18} "
        yield textwrap.fill(
            text, WIDTH, initial_indent=start, subsequent_indent=" " * len(start), break_on_hyphens=False
        )
        if name == "train" and section is Data and only is None:
            yield from _section(Source, indent + "    ")
        if name == "conditions":
            yield from _section(Condition, indent + "    ")


def _tuple(parts: Sequence[str], any_number: bool, limits: Sequence[Any]) -> str:
    if not any_number:
        return f"list [{', '.join(parts)}]"
    least = next((limit.min_length for limit in limits if hasattr(limit, "min_length")), 0)
    return f"list of {parts[0]}" + (f", {least} or more" if least else "")


def _bounds(limits: Sequence[Any]) -> Iterator[str]:
    """`(≥ 0, < 1)`; what has no bounds (patterns, validators) is told by the description."""
    found = [
        f"{sign} {getattr(limit, name):.10g}"
        for limit in limits
        for name, sign in BOUNDS.items()
        if hasattr(limit, name)
    ]
    if found:
        yield f"({', '.join(found)})"


# Resolver of the places that a config names: paths, URIs, hub ids, package:// files.


Resolved = TypeVar("Resolved", bound=AnyConfig)

JOB_FOLDER = "runtime_resources"
"""Part of the path under which Ray unpacks a submitted job's working directory."""
SHIPPED = ("pipelines/", "tune_spaces/")
"""Folders beside the package of which a wheel has the files in olora_ray/shipped/ (setup.py)."""
_PACKAGE = Path(__file__).parents[1]
ROOT = _PACKAGE / "shipped" if (_PACKAGE / "shipped").is_dir() else _PACKAGE.parent
"""Where these folders lie."""


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
    start, template = config.train.start, config.data.chat_template
    return _changed(
        config,
        run=_changed(config.run, storage=absolute(config.run.storage, lasting(folder), "run.storage")),
        model=_changed(config.model, name=name),
        data=_changed(
            config.data,
            train=_sources(config.data.train, folder, "data.train"),
            eval=_sources(config.data.eval, folder, "data.eval"),
            chat_template=template if template in (None, "plain") else absolute(template, folder, "data.chat_template"),
        ),
        train=_changed(config.train, start=start and left(start, folder, "train.start")),
    )


def is_there(place: Path, field: str) -> bool:
    """True if something lies at a path; raises UserError that names `field` where this user cannot look."""
    with as_user_error(f"{field}: {place}", OSError, reason=short_reason):
        return place.exists()


def lasting(folder: Path) -> Path:
    """The folder from which relative places to write are seen: a job's own folder is deleted after it."""
    return Path.home() / "olora_ray" if JOB_FOLDER in folder.parts else folder


def _changed(section: AnySection, **values: object) -> AnySection:
    return section.model_copy(update=values)


def absolute(place: str, folder: Path, field: str = "") -> str:
    """`place` itself if it is a URI, else as an absolute path seen from `folder`; raises UserError as `at_home`."""
    return place if is_uri(place) else os.path.normpath(folder / at_home(place, field))


def left(place: str, folder: Path, field: str = "") -> str:
    """The path as `absolute` gives it; for a job that lacks the file, the path where an earlier job has left it."""
    found = absolute(place, folder, field)
    kept = absolute(place, lasting(folder), field)
    return kept if os.path.exists(kept) and not os.path.lexists(found) else found


def shipped(place: str, folder: Path = Path()) -> str:
    """`place`, or the file of that name in the package if there is none: a wheel has pipelines/configs, say."""
    ours = place.startswith(SHIPPED) and not (folder / place).exists() and (ROOT / place).exists()
    return str(ROOT / place) if ours else place


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
    return _changed(source, path=absolute(shipped(source.path, folder), folder, f"{where}.path"), only=only)


HELP, VERSION = ("-h", "--help"), "--version"


@dataclass(frozen=True)
class Arguments:
    """The words of a command line, by kind."""

    words: tuple[str, ...]
    """All that are no flag and no option, in their order."""
    flags: frozenset[str]
    options: Mapping[str, str]
    """--name -> its value."""

    def names(self) -> list[str]:
        """The words that set no field; of a file that the package has, its path."""
        return [shipped(word) for word in self.words if "=" not in word]

    def changes(self) -> dict[str, Any]:
        """The words `section.field=value` as changes of a config; raises UserError for another word with =."""
        return parse_assignments([word for word in self.words if "=" in word])


def parse(
    argv: Sequence[str],
    usage: str,
    flags: Sequence[str] = (),
    options: Sequence[str] = (),
    fields: type[Section] | None = None,
) -> Arguments:
    """Sort the words of a command line: `flags` have no value, `options` have one (`--x y` or `--x=y`).

    --help prints usage, with `fields` also those of that config that a first run sets, or with `--help all` every one,
    and exits; so does --version. Raises UserError for a flag that is not known, with what may be meant: the nearest
    that is, or one of `fields`.
    """
    if VERSION in argv:
        print(f"olora-ray {version('olora-ray')}")
        raise SystemExit(0)
    if set(HELP) & set(argv):
        print(usage.strip())
        if fields and "all" in argv:
            print(f"\nFields, with their defaults:\n\n{help_text(fields)}")
        elif fields:
            print(f"\nFields of a first run, with their defaults; --help all shows all:\n\n{help_text(fields, FIRST)}")
        raise SystemExit(0)
    words, given, values = [], set(), dict[str, str]()
    rest = iter(argv)
    for word in rest:
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            words.append(word)
        elif name in options:
            values[name] = value if equals else _value(name, next(rest, None))
        elif name in flags and not equals:
            given.add(name)
        else:
            value = value if equals else next(rest, "")
            advice = _field_without_dashes(name, value) if fields and name not in flags else None
            raise UserError(mask(f"argument {word}: {advice or _unknown(name, flags, options)}"))
    return Arguments(tuple(words), frozenset(given), values)


def _value(name: str, value: str | None) -> str:
    if value is None or value.startswith("--"):
        raise UserError(f"argument {name}: its value is missing; --help shows how")
    return value


def _field_without_dashes(name: str, value: str) -> str | None:
    """Say how to set the field that a flag of this name, with this value, may mean; None if that is not known."""
    bare = name.lstrip("-")
    if field := bare if "." in bare else meant(bare):
        return f"fields are set without dashes: {field}={value if value and not value.startswith('-') else '...'}"
    return spelling_advice(bare)


def _unknown(name: str, flags: Sequence[str], options: Sequence[str]) -> str:
    if name in flags:
        return f"{name} has no value"
    known = [*flags, *options]
    if near := difflib.get_close_matches(name, [*known, *HELP, VERSION], n=1):
        return f"not known; did you mean {near[0]}?"
    return f"not known; there are {', '.join(known)} and --help" if known else "not known; there is --help"


def read_arguments(
    argv: Sequence[str], default: Path | None, usage: str, flags: Sequence[str] = ("--dry-run", "--show-config")
) -> tuple[Config, frozenset[str]]:
    """(config, flags that were given) from `[CONFIG.yaml] [section.field=value ...] [--dry-run] [--show-config]`.

    Raises UserError for anything it does not know.
    """
    found = parse(argv, usage, flags, fields=Config)
    if "--show-config" in found.flags and "--dry-run" not in found.flags:
        raise UserError("argument --show-config: give it with --dry-run; without it the run would begin")
    files = found.names()
    if len(files) > 1:
        raise UserError(
            f"arguments {' '.join(files)}: one config file at a time; fields are set as section.field=value"
        )
    if not files and default is None:
        raise UserError("argument CONFIG.yaml: missing; --help shows how")
    return _loaded(files[0] if files else str(default), found.changes()), found.flags


def read_search_arguments(argv: Sequence[str], usage: str) -> tuple[Config, str, frozenset[str]]:
    """(config, space file, flags) from `CONFIG.yaml SPACE.yaml [section.field=value ...] [--register] [--refit]`.

    Raises UserError for anything it does not know.
    """
    found = parse(argv, usage, ("--register", "--refit"), fields=Config)
    files = found.names()
    if len(files) != 2:
        raise UserError(
            f"arguments {' '.join(files) or '(none)'}: expected a config and a space file, e.g."
            " pipelines/configs/quickstart.yaml tune_spaces/smoke.yaml"
        )
    return _loaded(files[0], found.changes()), files[1], found.flags


def _loaded(file: str | Path, changes: dict[str, Any]) -> Config:
    return resolved(load(file, changes), Path.cwd())


class _Masking(logging.Formatter):
    """Libraries log addresses as they got them."""

    def format(self, record: logging.LogRecord) -> str:
        return mask(super().format(record))


def run(main: Callable[[list[str]], None]) -> None:
    """Run an entry script: what the user can fix is one line on stderr, or a list of Problems, and exit code 2.

    Exit code 75 means that the same command finishes the work later, 143 (SIGTERM) and 130 (Ctrl+C) that
    it was stopped and continues with the same command.
    """
    gc.set_threshold(100_000)  # what imports make stays: to look for garbage in it took a tenth of a start
    # What the encoding of stdout does not have is written as \u2713, as on stderr: rows and names may have anything.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler()
    handler.setFormatter(_Masking("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    try:
        with logs.printed():
            main(sys.argv[1:])
    except (UserError, StoreError) as error:
        lines = getattr(error, "lines", [str(error)])  # whose words may have line breaks of their own
        _end("error: " + "\n  ".join(" ".join(line.split()) for line in lines), error.exit_code)
    except Stopped as stopped:
        _end(str(stopped), stopped.exit_code)
    except KeyboardInterrupt:
        _end("stopped (SIGINT); the same command continues with what is done", 130)
    except BrokenPipeError:
        os._exit(141)
    except Exception as error:
        if line := of_the_machine(error):
            _end(f"error: {line}", UserError.exit_code)
        _end(traceback.format_exc().rstrip(), 1)  # a bug: with its traceback, but no secrets
    finally:
        gc.freeze()  # else the interpreter collects all that torch and Ray have made before it ends: 1.5 s


def _end(line: str, code: int) -> None:
    sys.stdout.flush()
    # In a job's log both streams meet: this must be the last line.
    print(mask(line), file=sys.stderr, flush=True)
    sys.exit(code)
