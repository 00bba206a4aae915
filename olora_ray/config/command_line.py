"""The command line of the entry scripts: arguments, help, paths, log lines and exit codes."""

import difflib
import gc
import glob
import importlib.util
import io
import itertools
import json
import logging
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from olora_ray.common import logs, outcome
from olora_ray.common.errors import (
    Stopped,
    StoreError,
    UserError,
    as_user_error,
    of_the_machine,
    short_reason,
)
from olora_ray.common.secrets import mask
from olora_ray.common.storage import is_uri
from olora_ray.common.text import window
from olora_ray.config.load import (
    build,
    changed,
    load_config,
    meant,
    parse_assignments,
    spelling_advice,
    validated,
)
from olora_ray.config.nights import Condition
from olora_ray.config.schema import TEMPLATES, AnyConfig, Config, Data, EvaluationConfig
from olora_ray.config.section import AnySection, NameIn, Section, Source, described, is_auto

logger = logging.getLogger(__name__)

# The schema in words: the values that a field accepts, its default, and the fields of --help.


NAMES = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "`true` or `false`",
    NoneType: "`null`",
}
BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
WIDTH = 112


def name_of(section: type[Section]) -> str:
    return section.__name__.lower()


def shape(
    annotation: Any, limits: Sequence[Any] = (), entry: Callable[[type[Section]], str] = name_of
) -> str:
    """Return in words which values a field accepts; `limits` are pydantic's constraints, `entry` names a section."""
    origin = get_origin(annotation)
    inner = get_args(annotation)
    if origin is Annotated:
        metadata = [*limits]
        for one in inner[1:]:
            metadata += one.metadata if isinstance(one, FieldInfo) else [one]
        return shape(inner[0], metadata, entry)
    if origin in (Union, UnionType):
        return " or ".join(shape(part, (), entry) for part in inner)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in inner)
    if origin is tuple:
        parts = [shape(part, (), entry) for part in inner if part is not Ellipsis]
        if Ellipsis not in inner:
            return f"list [{', '.join(parts)}]"
        words = f"list of {parts[0]}"
        least = next((limit.min_length for limit in limits if hasattr(limit, "min_length")), 0)
        if least:
            words += f", {least} or more"
        return words
    if origin is dict:
        return f"mapping of {shape(inner[0], (), entry)} to {shape(inner[1], (), entry)}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return entry(annotation)
    for limit in limits:
        if isinstance(limit, NameIn):
            return ", ".join(f"`{name}`" for name in limit.names())
    bounds = []
    for limit, (name, sign) in itertools.product(limits, BOUNDS.items()):
        if hasattr(limit, name):
            bounds.append(f"{sign} {getattr(limit, name):.10g}")
    if not bounds:
        return NAMES[annotation]
    return f"{NAMES[annotation]} ({', '.join(bounds)})"


def plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, default=list)


def default(field: FieldInfo) -> str:
    """A field's default as it would stand in a config, or `required`."""
    if field.is_required():
        return "required"
    return plain(field.get_default(call_default_factory=True))


FIRST = (
    *(
        "run.name",
        "model.name",
        "data.train",
        "data.eval",
        "data.max_length",
        "adapter.rank",
        "adapter.alpha",
    ),
    *("train.epochs", "train.global_batch", "train.micro_batch", "train.lr"),
    *("cluster.workers", "tracking.uri", "registry.model"),
)
"""The fields that --help shows, because a first run sets them."""


def help_text(config: type[Section] = Config, only: Collection[str] | None = None) -> str:
    """Return the fields of a config by section, with their docstrings, types and defaults.

    `only` names the fields to show, as section.field, and whole sections. None: all. A section that is not in Config is
    always shown.
    """
    lines = []
    for name, field in config.model_fields.items():
        section: Any = field.annotation
        shown = None
        if only is not None and name not in only and name in Config.model_fields:
            shown = [each for each in section.model_fields if f"{name}.{each}" in only]
        if shown != []:
            lines.append(f"{name}:")
            lines.extend(_section(section, "  ", shown))
    return "\n".join(lines)


def _section(
    section: type[Section], indent: str, only: Collection[str] | None = None
) -> Iterator[str]:
    for name, field in section.model_fields.items():
        if only is not None and name not in only:
            continue
        accepted = shape(field.annotation, field.metadata).replace("`", "")
        text = " ".join(f"{described(field)} ({accepted}) [{default(field)}]".split())
        start = f"{indent}{field.alias or name:<18} "
        yield textwrap.fill(
            text,
            min(WIDTH, window() or WIDTH),
            initial_indent=start,
            subsequent_indent=" " * len(start),
            break_on_hyphens=False,
        )
        if name == "train" and section is Data and only is None:
            yield from _section(Source, indent + "    ")
        if name == "conditions":
            yield from _section(Condition, indent + "    ")


# Paths, URIs, hub ids and package:// files in a config, made absolute.


Resolved = TypeVar("Resolved", bound=AnyConfig)

JOB_FOLDER = "runtime_resources"
"""Name of a folder above every working directory that Ray unpacks for a submitted job."""
SHIPPED = ("pipelines/", "tune_spaces/")
"""Folders beside the package; a wheel has their files in olora_ray/shipped/ (setup.py)."""
_PACKAGE = Path(__file__).parents[1]
ROOT = _PACKAGE / "shipped" if (_PACKAGE / "shipped").is_dir() else _PACKAGE.parent
"""The folder that contains the folders in SHIPPED."""


def resolved(config: Resolved, folder: Path = Path()) -> Resolved:
    """Return the config with all paths made absolute; relative paths start at `folder`.

    Workers have other working directories, so they must not get relative paths. In a submitted job a relative
    `run.storage` starts at the home directory, because Ray deletes the job's working directory. Raises UserError
    for a path that this user cannot read, or whose home folder does not exist.
    """
    name = config.model.name
    # ~ is expanded here because exports name the base model by this path, and other users have another ~.
    if not is_uri(name):
        path = job_path(name, folder, "model.name")
        if is_there(Path(path)):
            name = path
    start = config.train.start
    if start:
        start = job_path(start, folder, "train.start")
    template = config.data.chat_template
    if template and template not in TEMPLATES:
        template = absolute(template, folder, "data.chat_template")
    if isinstance(config, Config) and isinstance(config.gate.guard, tuple):
        guard = tuple(
            each if isinstance(each, str) else _source(each, folder, "gate.guard")
            for each in config.gate.guard
        )
        config = _changed(config, gate=_changed(config.gate, guard=guard))
    if isinstance(config, Config) and config.registry.verify:
        verify = absolute(config.registry.verify, folder, "registry.verify")
        config = _changed(config, registry=_changed(config.registry, verify=verify))
    storage = absolute(config.run.storage, lasting(folder), "run.storage")
    return _changed(
        config,
        run=_changed(config.run, storage=storage),
        model=_changed(config.model, name=name),
        data=_changed(
            config.data,
            train=_sources(config.data.train, folder, "data.train"),
            eval=_sources(config.data.eval, folder, "data.eval"),
            chat_template=template,
        ),
        train=_changed(config.train, start=start),
    )


def is_there(path: Path) -> bool:
    """True if a path of a model exists; raises UserError if this user cannot read its folder."""
    with as_user_error(f"model.name: {path}", OSError, reason=short_reason):
        return path.exists()


def lasting(folder: Path = Path()) -> Path:
    # Ray deletes the working directory of a job after the job, with all that was written there.
    if JOB_FOLDER in folder.absolute().parts:
        return Path.home() / "olora_ray"
    return folder


def _changed(section: AnySection, **values: object) -> AnySection:
    return section.model_copy(update=values)


def absolute(path: str, folder: Path = Path(), field: str = "") -> str:
    """Return a URI unchanged and a path made absolute from `folder`; raises UserError as `at_home`."""
    if is_uri(path):
        return path
    return os.path.abspath(folder / at_home(path, field))


def job_path(place: str, folder: Path = Path(), field: str = "") -> str:
    """Return the absolute path; in a job that lacks the file, the path to which an earlier job wrote it."""
    path = absolute(place, folder, field)
    # A later job has a new working directory, without the files that an earlier one wrote.
    kept = absolute(place, lasting(folder), field)
    if os.path.exists(kept) and not os.path.lexists(path):
        return kept
    return path


def shipped(path: str, folder: Path = Path()) -> str:
    """Return `path`, or the shipped file of that name (such as pipelines/configs/...) if `path` is missing."""
    # README and docs name these files relative to a checkout, and their commands must also work with a wheel.
    if path.startswith(SHIPPED) and not (folder / path).exists() and (ROOT / path).exists():
        return str(ROOT / path)
    return path


def at_home(path: str, field: str = "") -> Path:
    """Expand `~` in a path; raise UserError that names `field` if that home folder does not exist."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        where = f"{field}: {path}" if field else path
        raise UserError(
            f"{where}: '{Path(path).parts[0]}' has no home folder; write the absolute path"
        ) from None


def package_file(name: str, field: str = "model.name") -> Path:
    """Return the path of package://PACKAGE/FILE; raise UserError that names `field` if either is missing."""
    package, _, inner = name.removeprefix("package://").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{field}: {name}: Python package {package!r} is not installed; install it on every node"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / inner
    if not path.exists():
        files = sorted(item.name for item in path.parent.glob("*"))
        raise UserError(
            f"{field}: {name}: no such file in the package; its files: {', '.join(files) or 'none'}"
        )
    return path


def _sources(sources: Sequence[Source], folder: Path, setting: str) -> tuple[Source, ...]:
    """Return the sources with absolute paths, without those whose files may come later, unless there is no other."""
    found = [
        _source(source, folder, f"{setting}.{number}") for number, source in enumerate(sources)
    ]
    later = [source for source in found if _may_come_later(source)]
    if len(later) == len(found):
        return tuple(found)
    for source in later:
        logger.info(f"{setting}: no file matches {source.path} yet")
    return tuple(source for source in found if source not in later)


def _may_come_later(source: Source) -> bool:
    """True for a glob of a named format without a file: a day of feedback need not have files of all formats."""
    path = source.path
    if is_auto(source.format) or is_uri(path) or not glob.has_magic(path):
        return False
    return not os.path.exists(path) and next(glob.iglob(path, recursive=True), None) is None


def _source(source: Source, folder: Path, where: str) -> Source:
    only = tuple(absolute(name, folder, f"{where}.only") for name in source.only)
    path = absolute(shipped(source.path, folder), folder, f"{where}.path")
    return _changed(source, path=path, only=only)


HELP = ("-h", "--help")
VERSION = "--version"


@dataclass(frozen=True)
class Arguments:
    words: tuple[str, ...]
    """The words that are neither flags nor options, in their order."""
    flags: frozenset[str]
    options: Mapping[str, str]
    """--name -> its value; of a repeated option the last one."""
    given: tuple[tuple[str, str], ...] = ()
    """(--name, its value), in their order."""

    def names(self) -> list[str]:
        """Return the words that set no field; for shipped files, their path in the package."""
        return [shipped(word) for word in self.words if "=" not in word]

    def changes(self) -> dict[str, Any]:
        """Return the words `section.field=value` as changes of a config; raise UserError for other words with =."""
        return parse_assignments([word for word in self.words if "=" in word])


def parse(
    argv: Sequence[str],
    usage: str,
    flags: Sequence[str] = (),
    options: Sequence[str] = (),
    fields: type[Section] | None = None,
    first: Collection[str] = FIRST,
) -> Arguments:
    """Sort the words of a command line: `flags` have no value, `options` have one (`--x y` or `--x=y`).

    --help prints `usage` and exits. With `fields` it also prints the fields of that config: those in `first`, or all of
    them after `--help all`. --version prints the release and exits. Raises UserError for an unknown flag, with the
    nearest known one or the field that is meant.
    """
    if VERSION in argv:
        print(f"olora-ray {version('olora-ray')}")
        raise SystemExit(0)
    if set(HELP) & set(argv):
        print(usage.strip())
        if fields and "all" in argv:
            print(f"\nFields, with their defaults:\n\n{help_text(fields)}")
        elif fields:
            print(
                f"\nFields to begin with and their defaults (--help all: all):\n\n{help_text(fields, first)}"
            )
        raise SystemExit(0)
    words = []
    given = set()
    values = []
    rest = iter(argv)
    for word in rest:
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            words.append(word)
        elif name in options:
            if not equals:
                value = next(rest, "--")
                if value.startswith("--"):
                    raise UserError(f"argument {name}: its value is missing; see --help")
            values.append((name, value))
        elif name in flags and not equals:
            given.add(name)
        else:
            advice = None
            if fields and name not in flags:
                advice = _field_without_dashes(name, value if equals else next(rest, ""))
            raise UserError(mask(f"argument {word}: {advice or _unknown(name, flags, options)}"))
    return Arguments(tuple(words), frozenset(given), dict(values), tuple(values))


def _field_without_dashes(name: str, value: str) -> str | None:
    bare = name.lstrip("-")
    field = bare if "." in bare else meant(bare)
    if field:
        if not value or value.startswith("-"):
            value = "..."
        return f"set fields without dashes: {field}={value}"
    return spelling_advice(bare)


def _unknown(name: str, flags: Sequence[str], options: Sequence[str]) -> str:
    if name in flags:
        return f"{name} takes no value; write it alone"
    known = [*flags, *options]
    near = difflib.get_close_matches(name, [*known, *HELP, VERSION], n=1)
    if near:
        return f"unknown; did you mean {near[0]}?"
    if known:
        return f"unknown; use {', '.join(known)} or --help"
    return "unknown; see --help"


def read_arguments(
    argv: Sequence[str],
    usage: str,
    flags: Sequence[str] = ("--dry-run", "--show-config"),
    first: Collection[str] = FIRST,
) -> tuple[Config, frozenset[str]]:
    """Return (config, flags); raise UserError for unknown arguments."""
    arguments = parse(argv, usage, flags, fields=Config, first=first)
    if "--show-config" in arguments.flags and "--dry-run" not in arguments.flags:
        raise UserError("argument --show-config: works only with --dry-run; add --dry-run")
    files = arguments.names()
    if len(files) > 1:
        raise UserError(
            f"arguments {' '.join(files)}: use one config file; set fields as section.field=value"
        )
    if not files:
        raise UserError(
            "argument CONFIG.yaml: missing; `olora-ray init DATA` writes one for your rows; see --help"
        )
    return loaded(files[0], arguments.changes()), arguments.flags


def read_search_arguments(argv: Sequence[str], usage: str) -> tuple[Config, str, frozenset[str]]:
    """Return (config, space file, flags); raise UserError for unknown arguments."""
    arguments = parse(argv, usage, ("--register", "--refit"), fields=Config)
    files = arguments.names()
    if len(files) != 2:
        raise UserError(
            f"arguments {' '.join(files) or '(none)'}: expected a config and a space file, e.g."
            " pipelines/configs/quickstart.yaml tune_spaces/smoke.yaml"
        )
    return loaded(files[0], arguments.changes()), files[1], arguments.flags


def loaded(source: str | os.PathLike[str] | Mapping[str, Any], changes: dict[str, Any]) -> Config:
    """Return the config of a file, or of a mapping with its content, after `changes`, with absolute paths."""
    if isinstance(source, Mapping):
        return resolved(build(changed(source, changes)))
    return resolved(load_config(source, changes))


def loaded_for(model: str, changes: Mapping[str, Any]) -> EvaluationConfig:
    """Return the config of an evaluation of a model alone, after `changes`, with absolute paths."""
    tree = changed({"model": {"name": model}}, changes)
    return resolved(validated(EvaluationConfig, tree, "config"))


# Libraries log addresses as they got them, with the passwords in them.
class _Masking(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return mask(super().format(record))


OLDEST = {"ray": (2, 58), "torch": (2, 7), "transformers": (5, 5), "mlflow": (3, 12)}
"""The oldest versions that pyproject.toml allows: pip has not read it where a job brings this project to a cluster."""


def _check_versions() -> None:
    for package, oldest in OLDEST.items():
        needed = f"{package} {'.'.join(map(str, oldest))} or newer is needed"
        try:
            found = version(package)
        except PackageNotFoundError:
            raise UserError(
                f"{package} is not installed here: {needed}; a job can bring it: ray job submit --working-dir . "
                "--runtime-env deploy/runtime_env.yaml"
            ) from None
        if tuple(map(int, re.findall(r"\d+", found)[:2])) < oldest:
            raise UserError(f"{package} {found} is too old: {needed}, on all nodes")


def run(main: Callable[[list[str]], object]) -> None:
    """Run an entry script, print its error as one line (or a list of Problems) on stderr, and exit.

    Exit codes: 2 for an error that the user can fix; 75 if the same command resumes the work later; 143 (SIGTERM) and
    130 (Ctrl+C) if it was stopped and the same command resumes it.
    """
    # Objects that imports create live until the end. Collecting garbage among them took a tenth of a start.
    gc.set_threshold(100_000)
    # Rows and names may have characters that the encoding of stdout lacks: print them as \u2713, as stderr does.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler()
    handler.setFormatter(_Masking("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    try:
        _check_versions()
        with logs.printed():
            main(sys.argv[1:])
    except (UserError, StoreError) as error:
        lines = getattr(error, "lines", [str(error)])
        outcome.tell(busy_since=getattr(error, "since", None))  # of a lock
        # A file name or a library's text may contain line breaks.
        _end("error: " + "\n  ".join(" ".join(line.split()) for line in lines), error.exit_code)
    except Stopped as stopped:
        _end(str(stopped), stopped.exit_code)
    except KeyboardInterrupt:
        _end("stopped (Ctrl+C); to resume a run or a search, run the same command again", 130)
    except BrokenPipeError:
        os._exit(141)
    except Exception as error:
        line = of_the_machine(error)
        if line:
            _end(f"error: {line}", UserError.exit_code)
        _end(traceback.format_exc().rstrip(), 1)  # a bug, so the user needs the traceback
    finally:
        gc.freeze()  # otherwise the interpreter collects all objects of torch and Ray when it ends, in 1.5 s


def _end(line: str, code: int) -> None:
    sys.stdout.flush()
    outcome.tell(reason=mask(line))
    # A job's log contains both streams. The error must be its last line, so stdout goes first.
    print(mask(line), file=sys.stderr, flush=True)
    sys.exit(code)
