"""Progress lines say what a person wants to know."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from typing import Any

import pytest

from olora_ray.pipeline.progress import Progress, batch_split
from tests import tiny
from tests.said import said


def row(step: int, **changes: Any) -> dict[str, float]:
    return {
        "step": step,
        "train/loss": 1.5,
        "train/lr": 3e-4,
        "train/step_seconds": 2.0,
        "train/tokens_per_second": 100.0,
        "train/all_tokens_per_second": 250.0,
        "data/wait_fraction": 0.25,
        **changes,
    }


def lines(total: int, every: int, *rows: dict[str, float]) -> list[str]:
    with said() as told, Progress(total, every) as progress:
        for item in rows:
            progress.row(item)
    return told


@pytest.mark.parametrize(
    ("batch", "micro", "workers", "expected"),
    [
        (16, 4, 3, "16 sequences per step = 3 workers x 4 or 8 (4 at once, 2 accumulated)"),
        (10, 4, 2, "10 sequences per step = 2 workers x 4 or 6 (4 at once, 2 accumulated)"),
        (
            16,
            8,
            5,
            "16 sequences per step = 5 workers x 0 or 8 (8 at once, 1 accumulated); 3 workers without a micro-batch:"
            " use fewer workers, or train.micro_batch=3",
        ),
    ],
)
def test_the_split_of_a_batch_says_who_has_nothing_to_do(
    batch: int, micro: int, workers: int, expected: str
) -> None:
    config = tiny.decided(train__global_batch=batch, train__micro_batch=micro)
    assert batch_split(config, workers) == expected


def test_a_line_every_few_steps_has_loss_rate_speed_and_the_time_left() -> None:
    told = lines(7, 3, *(row(step) for step in range(1, 8)))
    assert [line.split(" | ")[0] for line in told] == ["step 3/7", "step 6/7", "step 7/7"]
    slow = lines(9, 50, *(row(step, **{"train/step_seconds": 12.0}) for step in range(1, 8)))
    assert [line.split(" | ")[0] for line in slow] == ["step 3/9", "step 6/9"]
    assert (
        told[0]
        == "step 3/7 | loss 1.5000 | lr 3.00e-04 | 250 tok/s, 100 supervised | data wait 25% | ETA about 0:08"
    )


def test_a_line_of_pairs_begins_with_their_results() -> None:
    of_pairs = {"loss": 0.412, "preferred": 0.86, "margin": 7.1, "chosen": 0.4}
    step = {f"train/pairs/{name}": value for name, value in of_pairs.items()}
    held_out = {f"eval/pairs/{name}": value for name, value in of_pairs.items()}
    trained, evaluated = lines(30, 2, row(20, **step), {"step": 20, "eval/loss": 2.5, **held_out})
    said = "pairs: loss 0.4120, 0.86 preferred, margin +7.1 nats, log p chosen +0.4"
    assert trained.startswith(f"step 20/30 | {said} | loss of right answers 1.5000 | lr 3.00e-04")
    assert evaluated == f"step 20/30 | eval {said} | eval loss of right answers 2.5000"


def test_the_time_left_counts_evaluations_and_begins_again_after_a_restart() -> None:
    with said() as told, Progress(40, 1) as progress:
        progress.row(row(1, **{"train/step_seconds": 0.01}))
        time.sleep(1.0)  # an evaluation
        progress.row(row(2, **{"train/step_seconds": 0.01}))
        progress.back_to(1)
        progress.row(row(2))
    minutes = [line.rpartition(" ")[2] for line in told]
    assert minutes[0] == "0:00"
    assert "0:19" <= minutes[1] <= "0:35"
    assert minutes[2] == "1:16"


TRAINING = """
import logging, time
from olora_ray.common import logs
from olora_ray.pipeline.progress import Progress
row = {"train/loss": 1.5, "train/lr": 3e-4, "train/step_seconds": 2.0, "train/tokens_per_second": 1.0,
       "train/all_tokens_per_second": 2.0, "data/wait_fraction": 0.0}
with logs.printed():
    with Progress(6, 2) as progress:
        for step in range(1, 7):
            time.sleep(0.15)
            progress.row({"step": step, **row, **({"eval/loss": 1.0, "eval/perplexity": 2.7} if step == 4 else {})})
            if step == 3:
                logging.getLogger("olora_ray.other").info("some line of another module")
    print("the end")
"""


def on_a_terminal() -> str:
    """What TRAINING sends to a terminal."""
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
    command = [sys.executable, "-c", TRAINING]
    env = {**os.environ, "COLUMNS": "200"}
    with subprocess.Popen(command, stdout=terminal, stderr=terminal, env=env) as process:
        os.close(terminal)
        sent = b""
        with contextlib.suppress(OSError):  # what a terminal's end raises
            while chunk := os.read(main, 4096):
                sent += chunk
    os.close(main)
    assert process.returncode == 0
    return sent.decode()


LINE = re.compile(
    r"\d\d:\d\d:\d\d (step [246]/6 \| (loss|eval loss) .*|some line of another module)|the end"
)


def test_on_a_terminal_lines_stand_above_the_bar() -> None:
    parts = [part for part in re.split(r"[\r\n]+", on_a_terminal()) if part.strip()]
    bars = [part for part in parts if re.match(r"\d/6", part)]
    assert bars[-1].startswith("6/6, loss 1.500, lr 3.0e-04, 0:00 left |")
    others = [part for part in parts if part not in bars]
    assert all(LINE.fullmatch(part) for part in others), parts
    assert len(others) == 6
