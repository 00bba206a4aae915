"""The command line of the entry scripts: arguments, log lines, exit codes."""

import difflib
import gc
import io
import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olora_ray.common import logs
from olora_ray.common.errors import Stopped, StoreError, UserError, of_the_machine
from olora_ray.common.secrets import mask
from olora_ray.config.describe import help_text
from olora_ray.config.dotted import parse_assignments
from olora_ray.config.load import load
from olora_ray.config.paths import resolved
from olora_ray.config.schema import Config, Section

HELP = ("-h", "--help")


@dataclass(frozen=True)
class Arguments:
    """The words of a command line, by kind."""

    words: tuple[str, ...]
    """All that are no flag and no option, in their order."""
    flags: frozenset[str]
    options: Mapping[str, str]
    """--name -> its value."""

    def names(self) -> list[str]:
        """The words that set no field."""
        return [word for word in self.words if "=" not in word]

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

    --help prints usage, with `fields` also every field of that config, and exits. Raises UserError for a flag that
    is not known, with the nearest that is.
    """
    if set(HELP) & set(argv):
        print(f"{usage.strip()}\n\nFields, with their defaults:\n\n{help_text(fields)}" if fields else usage.strip())
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
            raise UserError(f"argument {mask(word)}: {_unknown(name, flags, options)}")
    return Arguments(tuple(words), frozenset(given), values)


def _value(name: str, value: str | None) -> str:
    if value is None or value.startswith("--"):
        raise UserError(f"argument {name}: its value is missing; --help shows how")
    return value


def _unknown(name: str, flags: Sequence[str], options: Sequence[str]) -> str:
    if name in flags:
        return f"{name} has no value"
    known = [*flags, *options]
    if near := difflib.get_close_matches(name, [*known, *HELP], n=1):
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
    """Run an entry script: what the user can fix is one line on stderr and exit code 2.

    Exit code 75 means that the same command finishes the work later, 143 (SIGTERM) and 130 (Ctrl+C) that
    it was stopped and continues with the same command.
    """
    _print_all_characters()
    handler = logging.StreamHandler()
    handler.setFormatter(_Masking("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    try:
        with logs.printed():
            main(sys.argv[1:])
    except (UserError, StoreError) as error:
        _end(f"error: {' '.join(str(error).split())}", error.exit_code)
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


def _print_all_characters() -> None:
    """Let what the encoding of stdout does not have be written as \\u2713: rows and names of files may have anything.

    Python does so on stderr; on stdout it raises, in a locale without UTF-8, and for names that are not UTF-8 in any.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _end(line: str, code: int) -> None:
    sys.stdout.flush()
    # In a job's log both streams meet: this must be the last line.
    print(mask(line), file=sys.stderr, flush=True)
    sys.exit(code)
