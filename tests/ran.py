"""A command that is run to its end, with its output."""

import subprocess
from collections.abc import Sequence
from typing import Any


def ran(
    command: Sequence[object], code: int | None = 0, **more: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command, which must end with this exit code (None: with any)."""
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=600, check=False, **more
    )
    assert code in (None, done.returncode), f"{done.returncode}\n{done.stdout}{done.stderr}"
    return done
