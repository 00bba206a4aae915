"""Run a command for one night: again while it says "later", within a time limit, with a notification if not finished.

    python night.py [--hours 20] [--pause 300] [--tries 7] [--grace 120] CONFIG.yaml -- COMMAND [ARGUMENT ...]

While COMMAND ends with exit code 75 it runs again after --pause seconds, --tries times in all. After --hours it gets
SIGTERM, then --grace seconds for its checkpoint, then SIGKILL. SIGTERM and SIGINT are passed on to it. The exit code is
the command's own; 75 if the limit or the last try is reached, and 128 + N if signal N ended the command. For all but 0,
1 and 2, of which retrain.py tells, the notify section of CONFIG.yaml is told "not finished".
"""

import contextlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from olora_ray.common.errors import TryAgain, UserError
from olora_ray.config import command_line
from olora_ray.config.load import load
from olora_ray.config.schema import Config
from olora_ray.retrain import notify

logger = logging.getLogger("olora_ray.night")

DEFAULTS = {"--hours": 20.0, "--pause": 300.0, "--tries": 7.0, "--grace": 120.0}
AGAIN = TryAgain.exit_code
TOLD = (0, 1, 2)
"""Exit codes of which retrain.py tells itself, or which need no notification."""


def main(argv: list[str]) -> None:
    """Run the command to the end of the night, and exit with its code."""
    split = argv.index("--") if "--" in argv else len(argv)
    command = argv[split + 1 :]
    found = command_line.parse(argv[:split], __doc__ or "", options=tuple(DEFAULTS))
    if len(found.words) != 1 or not command:
        raise UserError("arguments: expected CONFIG.yaml -- COMMAND [ARGUMENT ...]; --help shows how")
    night = Night(DEFAULTS | _numbers(found.options))
    config = _loaded(found.words[0])
    code = night.run(command)
    if code not in TOLD:
        logger.warning(f"NOT FINISHED: {night.reason}; nothing is lost, the same command continues")
        if config is not None:
            notify.tell(config, "not finished", night.reason)
    raise SystemExit(code)


def _numbers(options: Mapping[str, str]) -> dict[str, float]:
    try:
        return {name: float(value) for name, value in options.items()}
    except ValueError as error:
        raise UserError(f"argument {' '.join(options)}: {error}; expected a number") from None


def _loaded(file: str) -> Config | None:
    """The config to notify by; None, with a warning, if it cannot be loaded: the command runs all the same."""
    try:
        return load(file)
    except UserError as error:
        logger.warning(f"nobody is told if this night is not finished: {error}")
        return None


class Night:
    """The tries of a command in one night."""

    def __init__(self, limits: Mapping[str, float]) -> None:
        """`limits` are those of DEFAULTS."""
        self.limits, self.end = limits, time.monotonic() + limits["--hours"] * 3600
        self.reason = ""
        """Why the night ended as it did."""
        self._child: subprocess.Popen[bytes] | None = None
        self._stop: signal.Signals | None = None
        """The signal to this process that was passed on."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._pass_on)

    def run(self, command: Sequence[str]) -> int:
        """Run the command until its exit code is another than 75, or there is no try or time left."""
        tries, pause = max(1, int(self.limits["--tries"])), self.limits["--pause"]
        for number in range(1, tries + 1):
            code = self._once(command)
            if code != AGAIN or self._stop or number == tries or time.monotonic() + pause >= self.end:
                break
            logger.info(f"exit code {AGAIN}: again in {pause:g} s (try {number} of {tries})")
            resume = time.monotonic() + pause
            while not self._stop and (left := resume - time.monotonic()) > 0:
                time.sleep(min(1, left))
            if self._stop:
                code = 128 + self._stop
                break
        if self._stop:
            self.reason = f"stopped by {self._stop.name}"
        return code

    def _once(self, command: Sequence[str]) -> int:
        """Run the command once, until the end of the night at the latest."""
        try:
            # In a session of its own: a driver that does not end takes its own children with it, and not this process.
            self._child = subprocess.Popen(command, start_new_session=True)
        except OSError as error:
            raise UserError(f"COMMAND {command[0]}: {error.strerror}; correct the words after --") from None
        if self._stop:  # it came before there was a child
            self._child.send_signal(self._stop)
        try:
            code = self._child.wait(max(0, self.end - time.monotonic()))
            self.reason = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
            return code if code >= 0 else 128 - code
        except subprocess.TimeoutExpired:
            code = self._stopped(self._child)
            self.reason = f"stopped after {self.limits['--hours']:g} hours, the limit of a night"
            return code if code in TOLD else AGAIN

    def _stopped(self, child: "subprocess.Popen[bytes]") -> int:
        """Stop the child, and by force what is left of its processes after the grace period; returns its exit code."""
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(self.limits["--grace"])
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        return child.wait()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._stop = signal.Signals(number)
        if self._child is not None:
            self._child.send_signal(number)


if __name__ == "__main__":
    command_line.run(main)
