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
itself, night.py sends "failed" (codes below 75), else "not finished", with the reason that COMMAND gives through a
pipe (olora_ray/common/outcome.py), or with the last line of its output.

A service elsewhere hears of every night, also of one whose machine is off: night.py calls the address of retrain.ping
with /start at the start, as it is at a good end, and with /fail and the reason at every other end.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any, TextIO

from olora_ray.common import outcome
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
        """The last line of the command's output."""
        self._facts: dict[str, Any] = {}
        """What the last run of the command has told (outcome.py)."""
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
        self._last = ""
        self._facts = {}
        self.told = False
        self.overlap = False
        facts, theirs = os.pipe()
        way = f"{theirs}:{os.fstat(theirs).st_ino}"
        try:
            # A session of its own, so that SIGKILL to its process group ends a hanging driver and its children, and not
            # this process.
            self._child = subprocess.Popen(
                command,
                start_new_session=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(theirs,),
                env={**os.environ, outcome.VARIABLE: way},
            )
        except OSError as error:
            raise UserError(
                f"COMMAND {command[0]}: {error.strerror}; correct the words after --"
            ) from None
        finally:
            os.close(theirs)
        copies = ((self._child.stdout, sys.stdout), (self._child.stderr, sys.stderr))
        readers = [threading.Thread(target=self._copy, args=both, daemon=True) for both in copies]
        readers.append(threading.Thread(target=self._hear, args=(facts,), daemon=True))
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
        busy_since = self._facts.get("busy_since")
        if how == f"exit code {AGAIN}" and busy_since:
            # A process that has been at work for longer than a night may take must not hide for ever.
            self.overlap = time.time() - busy_since <= self.limits["--hours"] * 3600
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
            if text:
                self._last = text

    def _hear(self, facts: int) -> None:
        with os.fdopen(facts, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                with contextlib.suppress(ValueError, TypeError):
                    self._facts |= json.loads(line)
                self.told = self.told or self._facts.get("sent") == "failed"

    def _with_last_line(self, how: str) -> str:
        lines = str(self._facts.get("reason") or self._last).splitlines()
        if lines and lines[0].startswith("Traceback"):
            lines = lines[-1:]
        line = mask(" ".join(" ".join(lines).split())).removeprefix("error: ")[:500]
        if how.startswith("exit code"):
            return f"{line} ({how})" if line else how
        return f"{how}; last line: {line}" if line else how

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
