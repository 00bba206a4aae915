"""Fault points: named moments of a run at which a test may make a process die, fail or hang.

    shard        a shard of the token store will be written next; step: its number
    initialise   all workers have initialised the adapter
    reference    the losses before the first step are measured, their file is missing
    evaluate     an evaluation begins
    step         a step was reported to the driver; step 0: the measurement of the base model
    checkpoint   one file of a checkpoint is written, the others are not
    export       the base model is copied into the merged folder, nothing is merged yet
    register     MLflow has the new version, its tags and alias are missing

Nothing happens there without a handler, which tests/recovery/faults installs.
"""

from collections.abc import Callable

Handler = Callable[[str, int | None, int | None], None]
"""Function of the point's name, the step and the worker's rank. The last two are None where they are unknown."""

handler: Handler | None = None


def reached(point: str, step: int | None = None, rank: int | None = None) -> None:
    """Call the handler, if there is one, at a fault point. Raises what the handler raises."""
    if handler is not None:
        handler(point, step, rank)
