"""Run a command for one night: again while it asks for that, within a time limit, with a notification if it fails.

    python night.py [--hours 20] [--pause 300] [--tries 7] [--grace 120] CONFIG.yaml -- COMMAND [ARGUMENT ...]

CONFIG.yaml  its section notify says who is notified
--hours      time limit; then COMMAND gets SIGTERM
--pause      seconds before COMMAND runs again after exit code 75
--tries      largest number of runs of COMMAND
--grace      seconds from SIGTERM to SIGKILL, for COMMAND's checkpoint

SIGTERM and SIGINT are passed on to COMMAND. Exit codes: COMMAND's own; 75 if the time limit or the last try is reached;
128 + N if signal N ended COMMAND. For all codes except 0, 1 and 2 night.py notifies "not finished"; for these
retrain.py notifies.
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
"""Exit codes that need no notification from here: retrain.py has notified, or there is nothing to tell."""


def main(argv: list[str]) -> None:
    split = argv.index("--") if "--" in argv else len(argv)
    command = argv[split + 1 :]
    parsed = command_line.parse(argv[:split], __doc__ or "", options=tuple(DEFAULTS))
    if len(parsed.words) != 1 or not command:
        raise UserError("arguments: expected CONFIG.yaml -- COMMAND [ARGUMENT ...]; --help shows how")
    night = Night(DEFAULTS | _numbers(parsed.options))
    config = _loaded(parsed.words[0])
    code = night.run(command)
    if code not in TOLD:
        logger.warning(f"NOT FINISHED: {night.reason}; nothing is lost, run the same command again to resume")
        if config is not None:
            notify.tell(config, "not finished", night.reason)
    raise SystemExit(code)


def _numbers(options: Mapping[str, str]) -> dict[str, float]:
    try:
        return {name: float(value) for name, value in options.items()}
    except ValueError as error:
        raise UserError(f"argument {' '.join(options)}: {error}; expected a number") from None


def _loaded(file: str) -> Config | None:
    # The command runs even with a broken config: its own error is clearer than this one.
    try:
        return load(file)
    except UserError as error:
        logger.warning(f"no notification if this night is not finished, because the config does not load: {error}")
        return None


class Night:
    def __init__(self, limits: Mapping[str, float]) -> None:
        """`limits` has the keys of DEFAULTS."""
        self.limits, self.end = limits, time.monotonic() + limits["--hours"] * 3600
        self.reason = ""
        """Why the night ended as it did."""
        self._child: subprocess.Popen[bytes] | None = None
        self._stop: signal.Signals | None = None
        """The signal to this process that was passed on."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._pass_on)

    def run(self, command: Sequence[str]) -> int:
        """Run the command until its exit code is not 75, or no try or time is left; return the exit code."""
        tries, pause = max(1, int(self.limits["--tries"])), self.limits["--pause"]
        for number in range(1, tries + 1):
            code = self._once(command)
            if code != AGAIN or self._stop or number == tries or time.monotonic() + pause >= self.end:
                break
            logger.info(f"exit code {AGAIN}: retrying in {pause:g} s (attempt {number} of {tries})")
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
        try:
            # A session of its own, so that SIGKILL to its process group ends a hanging driver and its children, and not
            # this process.
            self._child = subprocess.Popen(command, start_new_session=True)
        except OSError as error:
            raise UserError(f"COMMAND {command[0]}: {error.strerror}; correct the words after --") from None
        # A signal that came before the child existed was not passed on.
        if self._stop:
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
        """Stop the child, kill its remaining processes after the grace period, and return its exit code."""
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
