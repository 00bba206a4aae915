"""Progress of a training: lines in the log, and a bar below them on a terminal."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping

from tqdm import tqdm

from olora_ray.common import logs
from olora_ray.common.collectives import share
from olora_ray.common.text import plural
from olora_ray.config.decided import DecidedConfig

logger = logging.getLogger(__name__)

BAR = "{n_fmt}/{total_fmt}{postfix} |{bar}| {elapsed}"
"""Format of the bar; numbers come first, because a narrow terminal cuts the end."""


class Progress:
    """Writer of progress lines to the log, with a bar on a terminal.

    A line follows every `every` steps, steps that took 30 s together, and each evaluation.
    """

    def __init__(self, total: int | None, every: int) -> None:
        self.total = total
        self.every = every
        self.tokens = self.supervised = self.seconds = self.waited = 0.0
        self._steps = 0
        """Steps since the workers started."""
        self._trained = 0.0
        """Seconds in these steps."""
        self._began = 0.0
        """Time at which the first of these steps began."""
        self.bar = tqdm(
            total=total,
            bar_format=BAR,
            dynamic_ncols=True,
            leave=True,
            disable=not sys.stderr.isatty(),
        )
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Progress":
        if not self.bar.disable:
            self._stack.enter_context(logs.printed_within(self._aside))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self.bar.close()

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        # A line that is written while the bar is drawn would be appended to the bar.
        if sys.stdout.isatty():
            with tqdm.external_write_mode(file=sys.stdout):
                yield
            return
        # `| tee run.log` writes to the terminal a moment later, so the bar returns only with the next step.
        self.bar.clear()
        yield

    def line(self, text: str) -> None:
        logger.info(text)

    def set_total(self, total: int | None) -> None:
        self.total = total
        if total is not None:
            self.bar.total = total
            self.bar.refresh()

    def back_to(self, step: int) -> None:
        self.tokens = self.supervised = self.seconds = self.waited = 0.0
        self._steps = 0
        self._trained = 0.0
        self.bar.n = step
        self.bar.refresh()

    def row(self, row: dict[str, float]) -> None:
        step = int(row["step"])
        if "train/loss" in row:
            self._step(step, row)
        if "eval/loss" in row:
            text = f"{self._of(step)} | {losses(row, 'eval')}"
            if "eval/perplexity" in row:
                text += f" | perplexity {row['eval/perplexity']:.2f}"
            self.line(text)

    def _step(self, step: int, row: dict[str, float]) -> None:
        seconds = row["train/step_seconds"]
        self.seconds += seconds
        self.tokens += row["train/all_tokens_per_second"] * seconds
        self.supervised += row["train/tokens_per_second"] * seconds
        self.waited += row["data/wait_fraction"] * seconds
        if not self._steps:
            self._began = time.monotonic() - seconds
        self._steps += 1
        self._trained += seconds
        self.bar.update(step - self.bar.n)
        left = "?"
        if self.total is not None:
            # The clock counts evaluations too, but the rows of several steps may arrive together.
            spent = max(self._trained, time.monotonic() - self._began)
            left = clock((self.total - step) * spent / self._steps)
        self.bar.set_postfix_str(
            f"loss {row['train/loss']:.3f}, lr {row['train/lr']:.1e}, {left} left"
        )
        if step % self.every == 0 or step == self.total or self.seconds >= 30.0:
            text = (
                f"{self._of(step)} | {losses(row, 'train')} | lr {row['train/lr']:.2e}"
                f" | {self.tokens / self.seconds:.0f} tok/s, {self.supervised / self.seconds:.0f} supervised"
            )
            if "train/mfu" in row:
                text += f", {row['train/mfu']:.0%} of the GPUs' peak"
            self.line(f"{text} | data wait {self.waited / self.seconds:.0%} | ETA about {left}")
            self.tokens = self.supervised = self.seconds = self.waited = 0.0

    def _of(self, step: int) -> str:
        return f"step {step}/{'?' if self.total is None else self.total}"


def losses(row: Mapping[str, float], kind: str) -> str:
    """Return the losses of a step or an evaluation; those of preference pairs come first."""
    of = "eval " if kind == "eval" else ""
    loss = f"{row[f'{kind}/loss']:.4f}"
    pairs = of_pairs(row, kind)
    if not pairs:
        return f"{of}loss {loss}"
    return f"{of}pairs: {pairs} | {of}loss of right answers {loss}"


def of_pairs(row: Mapping[str, float], kind: str) -> str:
    """Return the results of preference pairs; "" without them."""
    found = {
        name.removeprefix(f"{kind}/pairs/"): value
        for name, value in row.items()
        if name.startswith(f"{kind}/pairs/")
    }
    if not found:
        return ""
    return (
        f"loss {found['loss']:.4f}, {found['preferred']:.2f} preferred, margin {found['margin']:+.1f} nats,"
        f" log p chosen {found['chosen']:+.1f}"
    )


def clock(seconds: float) -> str:
    """Return a remaining time as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}"


def batch_split(config: DecidedConfig, workers: int) -> str:
    """Return `16 sequences per step = 2 workers x 8 (4 at once, 2 accumulated)`, with advice if workers are idle."""
    size = config.train.global_batch
    micro = config.train.micro_batch
    count = config.train.micro_batches()
    parts = [share(count, worker, workers) for worker in range(workers)]
    shares = sorted(
        {min(part.stop * micro, size) - min(part.start * micro, size) for part in parts}
    )
    text = (
        f"{plural(size, 'sequence')} per step = {plural(workers, 'worker')} x {' or '.join(map(str, shares))}"
        f" ({min(micro, size)} at once, {config.accumulation(workers)} accumulated)"
    )
    if workers > count:
        advice = f"train.micro_batch={size // workers}"
        if size < workers:
            advice = f"train.global_batch={workers} and train.micro_batch=1"
        idle = plural(workers - count, "worker")
        text += f"; {idle} without a micro-batch: use fewer workers, or {advice}"
    return text
