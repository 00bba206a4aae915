"""What the first worker has done, and when: the file `done` that the fault points write."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Done:
    """A line of the file."""

    what: str
    """`step 12`, or `initialisation`."""
    at: float
    """As time.time()."""
    pid: int

    @property
    def step(self) -> int:
        """Its number; 0 for what is no step."""
        return int(self.what.removeprefix("step ")) if self.what.startswith("step ") else 0


def read(folder: Path) -> list[Done]:
    """All lines so far that are complete."""
    file = folder / "done"
    whole = file.read_text().rpartition("\n")[0] if file.exists() else ""
    return [_parsed(line) for line in whole.splitlines()]


def steps(done: Sequence[Done]) -> list[Done]:
    """The steps among them, in the order in which they were done."""
    return sorted((one for one in done if one.step), key=lambda one: one.at)


def _parsed(line: str) -> Done:
    what, at, pid = line.split("\t")
    return Done(what, float(at), int(pid))
