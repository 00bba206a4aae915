"""Run a command for one night: again while it asks for that, within a time limit, with a notification if it fails.

    python night.py [--hours 20] [--pause 300] [--tries 7] [--grace 120] [--log FILE] CONFIG.yaml -- COMMAND [WORD ...]

CONFIG.yaml  its section notify says who is notified
--hours      time limit; then COMMAND gets SIGTERM
--pause      seconds before COMMAND runs again after exit code 75
--tries      largest number of runs of COMMAND
--grace      seconds from SIGTERM to SIGKILL, for COMMAND's checkpoint
--log        file to which COMMAND's output is appended, too; a pod's own log is deleted with the pod

SIGTERM and SIGINT are passed on to COMMAND, and its output is copied to this process's as it comes. Exit codes:
COMMAND's own; 75 if the time limit or the last try is reached; 128 + N if signal N ended COMMAND; 0 if another process
was at work on the model until the last try, because no night failed. After every other end that COMMAND has not told
itself, night.py sends "failed" (codes below 75), else "not finished", with the last line of the output.

A service elsewhere hears of every night, also of one whose machine is off: night.py calls the address of retrain.ping
with /start at the start, as it is at a good end, and with /fail and the reason at every other end.
"""

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, TextIO

from olora_ray.common import lock
from olora_ray.common.errors import TryAgain, UserError
from olora_ray.common.secrets import mask
from olora_ray.config import command_line
from olora_ray.config.load import build, load_config, read_tree
from olora_ray.config.schema import Config
from olora_ray.retrain import notify

logger = logging.getLogger("olora_ray.night")

DEFAULTS = {"--hours": 20.0, "--pause": 300.0, "--tries": 7.0, "--grace": 120.0}
AGAIN = TryAgain.exit_code


def main(argv: list[str]) -> None:
    split = argv.index("--") if "--" in argv else len(argv)
    command = argv[split + 1 :]
    parsed = command_line.parse(argv[:split], __doc__ or "", options=(*DEFAULTS, "--log"))
    if len(parsed.words) != 1 or not command:
        raise UserError(
            "arguments: expected CONFIG.yaml -- COMMAND [ARGUMENT ...]; --help shows how"
        )
    limits = {
        name: _number(name, text) for name, text in parsed.options.items() if name in DEFAULTS
    }
    file = parsed.options.get("--log")
    night = Night(DEFAULTS | limits, _opened(file) if file else None)
    config = _loaded(parsed.words[0])
    _ping(config, "/start")
    try:
        code = night.run(command)
    except UserError as error:
        _tell(config, "failed", str(error))
        _ping(config, "/fail", str(error))
        raise
    if night.overlap:
        logger.info(f"SKIPPED: {night.reason}")
        code = 0
    elif code and not night.told:
        event = "not finished" if code >= AGAIN or night.stopped else "failed"
        if event == "not finished":
            logger.warning(
                f"NOT FINISHED: {night.reason}; nothing is lost, run the same command again to resume"
            )
        _tell(config, event, night.reason)
    _ping(config, "/fail" if code else "", night.reason)
    raise SystemExit(code)


def _opened(file: str) -> IO[bytes]:
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        return open(file, "ab", buffering=0)
    except OSError as error:
        raise UserError(
            f"argument --log: {file}: {error.strerror}; name a file that this process may write"
        ) from None


def _number(name: str, text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1e6:  # false for nan
            return float(text)
    raise UserError(f"argument {name}: {text!r}; expected a number from 0 to 1,000,000")


def _loaded(file: str) -> Config | None:
    # The command runs even with a broken config, because its own error is clearer than one from here. Who is told of it
    # stands in some sections, which may be valid.
    try:
        return load_config(file)
    except UserError as error:
        problem = error
    try:
        told = {
            name: section
            for name, section in read_tree(file).items()
            if name in ("registry", "notify", "retrain")
        }
        return build(
            {
                "run": {"name": Path(file).stem},
                "model": {"name": "-"},
                "data": {"train": ["-"]},
                **told,
            },
            file,
        )
    except UserError:
        logger.warning(
            f"this night sends no notification, because the config does not load: {problem}"
        )
        return None


def _tell(config: Config | None, event: str, reason: str) -> None:
    if config is not None:
        notify.tell(config, event, reason)


def _ping(config: Config | None, signal: str, reason: str = "") -> None:
    if config is not None:
        notify.ping(config, signal, reason)


class Night:
    def __init__(self, limits: Mapping[str, float], log: IO[bytes] | None) -> None:
        """`limits` has the keys of DEFAULTS."""
        self._log = log
        self.limits, self.end = limits, time.monotonic() + limits["--hours"] * 3600
        self.reason = ""
        """Why the night ended as it did."""
        self.told = False
        """True if the last run of the command has told by itself that it failed."""
        self.overlap = False
        """True if the last run of the command has found another process at work, which has not been so for too long."""
        self.stopped: signal.Signals | None = None
        """The signal to this process that was passed on."""
        self._child: subprocess.Popen[bytes] | None = None
        self._last = ""
        """The last line of the command's output that may say how it ended."""
        self._error: IO[bytes] | None = None
        """The stream with the command's error; None: there was none."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._pass_on)

    def run(self, command: Sequence[str]) -> int:
        """Run the command until its exit code is not 75, or no try or time is left; return the exit code."""
        tries, pause = max(1, int(self.limits["--tries"])), self.limits["--pause"]
        for number in range(1, tries + 1):
            code = self._once(command)
            if (
                code != AGAIN
                or self.stopped
                or number == tries
                or time.monotonic() + pause >= self.end
            ):
                break
            logger.info(f"exit code {AGAIN}: retrying in {pause:g} s (attempt {number} of {tries})")
            resume = time.monotonic() + pause
            while not self.stopped and (left := resume - time.monotonic()) > 0:
                time.sleep(min(1, left))
            if self.stopped:
                code = 128 + self.stopped
                break
        if self.stopped:
            self.overlap, self.reason = (
                False,
                self._with_last_line(f"stopped by {self.stopped.name}"),
            )
        return code

    def _once(self, command: Sequence[str]) -> int:
        self._last, self._error, self.told = "", None, False
        try:
            # A session of its own, so that SIGKILL to its process group ends a hanging driver and its children, and not
            # this process.
            self._child = subprocess.Popen(
                command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        except OSError as error:
            raise UserError(
                f"COMMAND {command[0]}: {error.strerror}; correct the words after --"
            ) from None
        copies = ((self._child.stdout, sys.stdout), (self._child.stderr, sys.stderr))
        readers = [threading.Thread(target=self._copy, args=both, daemon=True) for both in copies]
        for reader in readers:
            reader.start()
        # A signal that came before the child existed was not passed on.
        if self.stopped:
            self._child.send_signal(self.stopped)
        try:
            code = self._child.wait(max(0, self.end - time.monotonic()))
            how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        except subprocess.TimeoutExpired:
            code = AGAIN if self._ended(self._child) else 0
            how = f"stopped after {self.limits['--hours']:g} hours, the limit of a night"
        for reader in readers:
            reader.join(2)  # a process that the command has left behind may hold its end
        self.reason = self._with_last_line(how)
        self.overlap = (
            how == f"exit code {AGAIN}" and lock.RUNNING in self._last and not self._hangs()
        )
        return code if code >= 0 else 128 - code

    def _copy(self, source: IO[bytes], target: TextIO) -> None:
        for line in source:
            with contextlib.suppress(
                OSError
            ):  # the command must not wait because nobody reads this output
                target.buffer.write(line)
                target.flush()
            with contextlib.suppress(OSError):  # a full volume must not end the night
                if self._log:
                    self._log.write(line)
            text = line.decode(errors="replace").strip()
            if text.startswith("error: "):
                self._error = source
            # The other stream's thread may read lines later that are older than the error. What was sent is no reason.
            if (
                text
                and self._error in (None, source)
                and not text.endswith(notify.SENT.partition("}")[2])
            ):
                self._last = text
            self.told = self.told or notify.SENT.format("failed") in text

    def _with_last_line(self, how: str) -> str:
        line = mask(self._last).removeprefix("error: ")[:500]
        if how.startswith("exit code"):
            return f"{line} ({how})" if line else how
        return f"{how}; last line: {line}" if line else how

    def _hangs(self) -> bool:
        """True if the other process has been at work for longer than a night may take: it must not hide for ever."""
        since = re.search(r"since (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)", self._last)
        age = (
            time.time() - time.mktime(time.strptime(since[1], "%Y-%m-%d %H:%M:%S"))
            if since
            else 0.0
        )
        return age > self.limits["--hours"] * 3600

    def _ended(self, child: "subprocess.Popen[bytes]") -> int:
        """Stop the child, kill its remaining processes after the grace period, and return its exit code."""
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(self.limits["--grace"])
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        return child.wait()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.stopped = signal.Signals(number)
        if self._child is not None:
            self._child.send_signal(number)


if __name__ == "__main__":
    command_line.run(main)
