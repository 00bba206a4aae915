"""The command line of pipelines/evaluate.py."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from olora_ray.common.errors import UserError
from olora_ray.config.dotted import parse_assignments
from olora_ray.evaluation.lm_eval_tasks import PAPER


@dataclass(frozen=True)
class Request:
    """An evaluation as the command line asks for it."""

    models: tuple[str, ...]
    """One or two."""
    config: str | None
    changes: Mapping[str, Any]
    """Dotted field -> value, to be changed in the config."""
    tasks: tuple[str, ...]
    task_data: str | None
    limit: int | None
    """Rows of each task; None: all."""
    out: str | None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help shows how it is called")


def read(argv: list[str], usage: str) -> Request:
    """The request in `argv`; --help prints `usage` and exits. Raises UserError for what it does not know."""
    if {"-h", "--help"} & set(argv):
        print(usage.strip())
        raise SystemExit(0)
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    for name in ("--config", "--tasks", "--task-data", "--scorer", "--out"):
        parser.add_argument(name)
    parser.add_argument("--limit", type=_positive)
    found = parser.parse_intermixed_args(argv)
    models = tuple(word for word in found.words if "=" not in word)
    if not 1 <= len(models) <= 2:
        raise UserError(f"expected one model, or two to compare, not {len(models)}; --help shows how it is called")
    changes = parse_assignments([word for word in found.words if "=" in word])
    if found.scorer:
        changes["evaluation.scorer"] = found.scorer
    return Request(models, found.config, changes, _tasks(found.tasks), found.task_data, found.limit, found.out)


def _tasks(text: str | None) -> tuple[str, ...]:
    names = [name for part in (text or "").split(",") if (name := part.strip())]
    chosen = [each for name in names for each in (PAPER if name == "paper" else (name,))]
    return tuple(dict.fromkeys(chosen))


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of rows, not {text!r}")
    return int(text)
