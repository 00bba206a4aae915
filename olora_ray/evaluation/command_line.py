"""The command line of pipelines/evaluate.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from olora_ray.common.errors import UserError
from olora_ray.config import command_line
from olora_ray.evaluation.lm_eval_tasks import PAPER

OPTIONS = ("--config", "--tasks", "--task-data", "--limit", "--scorer", "--out")


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


def read(argv: Sequence[str], usage: str) -> Request:
    """The request in `argv`; --help prints `usage` and exits. Raises UserError for what it does not know."""
    found = command_line.parse(argv, usage, options=OPTIONS)
    models, changes, options = tuple(found.names()), found.changes(), found.options
    if not 1 <= len(models) <= 2:
        raise UserError(f"expected one model, or two to compare, not {len(models)}; --help shows how")
    if scorer := options.get("--scorer"):  # an unset variable of a script is no wish for none
        changes["evaluation.scorer"] = scorer
    return Request(
        models=models,
        config=options.get("--config"),
        changes=changes,
        tasks=_tasks(options.get("--tasks", "")),
        task_data=options.get("--task-data"),
        limit=_rows(options["--limit"]) if "--limit" in options else None,
        out=options.get("--out"),
    )


def _tasks(text: str) -> tuple[str, ...]:
    names = [name for part in text.split(",") if (name := part.strip())]
    chosen = [each for name in names for each in (PAPER if name == "paper" else (name,))]
    return tuple(dict.fromkeys(chosen))


def _rows(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"argument --limit: expected a number of rows, not {text!r}")
    return int(text)
