"""The command line of the entry scripts: arguments, log lines, exit codes."""

import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from olora_ray.common import logs
from olora_ray.common.errors import Stopped, UserError
from olora_ray.common.secrets import mask
from olora_ray.config.dotted import parse_assignments
from olora_ray.config.load import load
from olora_ray.config.paths import resolved
from olora_ray.config.schema import Condition, Config, Data, Section, Source


def read_arguments(argv: list[str], default: Path | None, usage: str) -> tuple[Config, bool]:
    """(config, whether --dry-run was given) from `[CONFIG.yaml] [section.field=value ...] [--dry-run]`.

    --help prints usage and every field, and exits. Raises UserError for anything it does not know.
    """
    flags, files, changes = _sorted(argv, ("--dry-run",), usage)
    if len(files) > 1:
        raise UserError(
            f"arguments {' '.join(files)}: one config file at a time; fields are set as section.field=value"
        )
    if not files and default is None:
        raise UserError("argument CONFIG.yaml: missing; --help shows how")
    return _loaded(files[0] if files else str(default), changes), "--dry-run" in flags


def read_search_arguments(argv: list[str], usage: str) -> tuple[Config, str, set[str]]:
    """(config, space file, flags) from `CONFIG.yaml SPACE.yaml [section.field=value ...] [--register] [--refit]`.

    Otherwise like `read_arguments`.
    """
    flags, files, changes = _sorted(argv, ("--register", "--refit"), usage)
    if len(files) != 2:
        raise UserError(
            f"arguments {' '.join(files) or '(none)'}: expected a config and a space file, e.g."
            " pipelines/configs/quickstart.yaml tune_spaces/smoke.yaml"
        )
    return _loaded(files[0], changes), files[1], flags


def _sorted(argv: list[str], known: tuple[str, ...], usage: str) -> tuple[set[str], list[str], dict[str, Any]]:
    """(flags, files, changes of the config)."""
    if {"-h", "--help"} & set(argv):
        print(f"{usage.strip()}\n\nFields, with their defaults:\n\n{help_text()}")
        raise SystemExit(0)
    flags = [word for word in argv if word.startswith("-")]
    if unknown := [flag for flag in flags if flag not in known]:
        raise UserError(f"argument {unknown[0]}: not known; there are {', '.join(known)} and --help")
    words = [word for word in argv if word not in flags]
    files = [word for word in words if "=" not in word]
    return set(flags), files, parse_assignments([word for word in words if "=" in word])


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
    handler = logging.StreamHandler()
    handler.setFormatter(_Masking("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    try:
        with logs.printed():
            main(sys.argv[1:])
    except UserError as error:
        _end(f"error: {' '.join(str(error).split())}", error.exit_code)
    except Stopped as stopped:
        _end(str(stopped), stopped.exit_code)
    except KeyboardInterrupt:
        _end("stopped (SIGINT); the same command continues with what is done", 130)
    except BrokenPipeError:
        os._exit(141)
    except Exception:  # a bug: with its traceback, but no secrets
        _end(traceback.format_exc().rstrip(), 1)


def _end(line: str, code: int) -> None:
    sys.stdout.flush()
    # In a job's log both streams meet: this must be the last line.
    print(mask(line), file=sys.stderr, flush=True)
    sys.exit(code)


def help_text() -> str:
    """Every field with its default and its docstring, by section."""
    lines = []
    for name, field in Config.model_fields.items():
        section = field.annotation
        assert isinstance(section, type)
        assert issubclass(section, Section)
        lines.append(f"{name}:")
        lines.extend(_field_help(section, "  "))
    return "\n".join(lines)


def _field_help(section: type[Section], indent: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        default = "required" if field.is_required() else repr(field.get_default(call_default_factory=True))
        yield f"{indent}{field.alias or name:<18} {field.description} [{default}]"
        if name == "train" and section is Data:
            yield from _field_help(Source, indent + "    ")
        if name == "conditions":
            yield from _field_help(Condition, indent + "    ")
