"""Monitor of a training: takes what the workers report, shows it to people and tracks it."""

from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from olora_ray.cluster.channel import Failure, Message, Resumed, Saved, Started
from olora_ray.pipeline.progress import Progress
from olora_ray.tracking.prometheus import Telemetry
from olora_ray.tracking.run import Tracker

Event = Started | Resumed | Failure
OnRow = Callable[[int, dict[str, float]], None]
"""Gets the metrics of every step, once per attempt; after a restart also those from before it."""


class Monitor:
    """Drains the channel of one training, whatever the number of its attempts."""

    def __init__(
        self, channel: Any, tracker: Tracker, progress: Progress, telemetry: Telemetry, on_row: OnRow | None = None
    ) -> None:
        self.channel, self.tracker, self.progress, self.telemetry = channel, tracker, progress, telemetry
        self.on_row = on_row
        self.highest = tracker.last_step("train/loss") or 0
        """The last step that is known to be done."""

    def collect(self, on_event: Callable[[Event], None]) -> None:
        """Show and track what has arrived; `on_event` gets what concerns the attempt, in its place among the rows."""
        try:
            messages: list[Message] = ray.get(self.channel.drain.remote(), timeout=30)
        except RayError:
            return  # progress only; the history is in the checkpoint
        rows: dict[int, dict[str, float]] = {}
        for message in messages:
            match message:
                case str():
                    self.progress.line(message)
                case Saved():
                    self.telemetry.saved(message.seconds)
                case Started() | Failure():
                    on_event(message)
                case Resumed():
                    rows |= {int(row["step"]): _without_step(row) for row in message.history}
                    on_event(message)
                case dict():
                    rows[int(message["step"])] = _without_step(message)
                    self.highest = max(self.highest, int(message["step"]))
                    self.progress.row(message)
                    self.telemetry.row(message)
        if rows:
            self.tracker.metrics(rows)
        if self.on_row:
            for step, row in sorted(rows.items()):
                self.on_row(step, row)


def _without_step(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step"}
