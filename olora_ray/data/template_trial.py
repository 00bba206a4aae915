"""Trial of a chat template in a process of its own, where its time and memory have a limit.

jinja2's sandbox keeps a template away from files and processes, but `{{ 10 ** 10 ** 9 }}` and nested loops run for
ever. One conversation of two messages is rendered here first, and only a template that comes through is used; one that
waits for a certain message to misbehave is not found.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from olora_ray.common.errors import UserError
from olora_ray.data.chat_template import ChatTemplate

SECONDS = 2
"""Of processor time; a template takes some milliseconds."""
MEMORY = 2**30
LONGEST = 2**20
"""Characters of the two messages with all that the template adds."""
PATIENCE = 120.0
"""Seconds until the process counts as stuck, however busy the machine is."""
TOO_MUCH = 3
"""Exit code of a trial that reached a limit without being killed."""
MESSAGES = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"})
Tokens = tuple[tuple[str, str], ...]
"""Names and texts of special tokens."""


_tried_elsewhere: set[tuple[str, Tokens]] = set()


def take_as_tried(source: str, special_tokens: Mapping[str, str]) -> None:
    """Do not try a template in this process: another one, whose work this one does, has done it."""
    _tried_elsewhere.add((source, _sorted(special_tokens)))


def check(source: str, special_tokens: Mapping[str, str], name: str) -> None:
    """Raise UserError if rendering two messages takes too much; each template is tried once in a process."""
    key = (source, _sorted(special_tokens))
    if key not in _tried_elsewhere and not _comes_through(*key):
        raise UserError(
            f"model.name: the chat template of {name} takes more than {SECONDS} s or {MEMORY // 2**30} GiB for two"
            " short messages, so it is not used: take another model, or put a right chat_template.jinja in its folder"
        )


def _sorted(special_tokens: Mapping[str, str]) -> Tokens:
    return tuple(sorted(special_tokens.items()))


@lru_cache(maxsize=64)
def _comes_through(source: str, special_tokens: Tokens) -> bool:
    # What this process imports from, and not (-P) whatever lies in the current folder.
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *filter(None, sys.path)])
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", __name__],
            input=json.dumps({"source": source, "special_tokens": dict(special_tokens)}).encode(),
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    if done.returncode < 0 or done.returncode == TOO_MUCH:
        return False
    if done.returncode:
        raise RuntimeError(f"the trial of a chat template cannot run: {done.stderr.decode(errors='replace')[-1000:]}")
    return True


def _limit() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _try(source: str, special_tokens: Mapping[str, str]) -> int:
    """0, or TOO_MUCH; a template that raises is judged where its error can be shown."""
    try:
        template = ChatTemplate(source, special_tokens)
        rendered = [template.render(MESSAGES[:count], count == 1) for count in (1, 2)]
    except MemoryError:
        return TOO_MUCH
    except Exception:
        return 0
    return TOO_MUCH if sum(map(len, rendered)) > LONGEST else 0


if __name__ == "__main__":
    _limit()
    _wanted: dict[str, Any] = json.load(sys.stdin)
    sys.exit(_try(**_wanted))
