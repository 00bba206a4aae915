"""Fault points: named moments of a run at which a test may let a process die, fail or stand still.

    shard        a shard of the token store is about to be made; step: its number
    initialise   the adapter was initialised by all workers
    evaluate     an evaluation begins
    step         a step was told to the driver; step 0: the measurement of the base model
    checkpoint   one file of a checkpoint is written, the others are not
    export       the base model is copied into the merged folder, nothing is merged yet
    register     MLflow has the new version, its tags and alias are missing

Nothing happens there unless a handler is installed: see tests/recovery/faults.
"""

from collections.abc import Callable

Handler = Callable[[str, int | None, int | None], None]
"""Called with the point's name, and the step and the worker's rank where they are known."""

handler: Handler | None = None
"""The handler of this process."""


def reached(point: str, step: int | None = None, rank: int | None = None) -> None:
    """Tell the handler, if there is one, that this process is at a point; what it raises goes through."""
    if handler is not None:
        handler(point, step, rank)
