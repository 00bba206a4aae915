"""Lets events happen to a run on a cluster, gives the command again where a user has to, and sees that it goes on."""

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import psutil

from tests.recovery import moments, processes
from tests.recovery.cluster import Cluster
from tests.recovery.events import Event
from tests.recovery.hosts import Host

Say = Callable[[str], None]
LOOK = 1.0
"""Seconds between two looks at the run."""
STATUS = 60.0
"""Seconds between two lines about it."""
STALL = 300.0
"""Seconds without a step, or another end, after which the run counts as lost."""
NOTICE = 20
"""Seconds between the notice that a host will be taken away, and that."""
STOP = 120.0
"""Seconds within which SIGTERM has to end the driver."""
STOPPED = (143, -signal.SIGTERM)
"""Exit codes after SIGTERM; the second before Python has come as far as to take the signal."""
KILLED = (-signal.SIGKILL,)
BUSY = (75,)
"""Exit code of a command whose predecessor, or its lock, is still there."""


class Disturbances:
    """Of one run."""

    def __init__(self, cluster: Cluster, say: Say) -> None:
        self.cluster, self.run, self.say = cluster, cluster.run, say
        self.happened: list[str] = []
        self.problems: list[str] = []
        """What should not have happened, though the run went on."""
        self.over = False
        """Whether the command has ended well."""
        self._moved = self._told = time.time()
        self._away: Host | None = None
        """A host that is meant to be down."""
        self._nodes: dict[int, psutil.Process | None] = {}
        self._acts: dict[str, Callable[[Event], None]] = {
            "SIGKILL of a worker": self._kill_worker,
            "SIGSTOP of a worker": self._stop_worker,
            "exception in a worker": self._fail_worker,
            "host drained and back": self._drain_host,
            "host killed and back": self._kill_host,
            "link cut": self._cut_link,
            "SIGKILL of a controller": self._kill_controller,
            "SIGTERM of the driver": self._terminate_driver,
            "SIGKILL of the driver": self._kill_driver,
        }

    def begin(self) -> None:
        """Give the command, and wait until it trains."""
        self.run.start()
        self._moved = time.time()
        while not self.over and not moments.steps(moments.read(self.run.folder)):
            self._look()
            time.sleep(LOOK)

    def go_on(self, events: Iterator[Event], seconds: float) -> None:
        """Let events happen for so long."""
        last = time.time()
        end = last + seconds
        for event in events:
            self.watch(min(end, last + event.gap) - time.time())
            if self.over or time.time() >= end:
                return
            last = time.time()
            self._acts[event.what](event)

    def finish(self, seconds: float) -> None:
        """Wait for the run's end, with no more events and as fast as it can; AssertionError if it takes longer."""
        self.say("no more events: the rest of the steps")
        (self.run.folder / "hurry").touch()
        self.watch(seconds)
        assert self.over, f"the run does not end\n{self.run.tail()}"

    def watch(self, seconds: float) -> None:
        """Look after the run for so long, or until its end."""
        end = time.time() + seconds
        while not self.over and (left := end - time.time()) > 0:
            self._look()
            time.sleep(min(LOOK, left))

    def _look(self) -> None:
        self._command_again()
        self._revive()
        done = moments.steps(moments.read(self.run.folder))
        self._moved = max(self._moved, done[-1].at if done else 0.0)
        assert time.time() - self._moved < STALL, f"no step for {STALL:.0f} s\n{self.run.tail()}"
        if time.time() - self._told >= STATUS:
            self._told = time.time()
            step = max((one.step for one in done), default=0)
            self.say(f"step {step}, {len(self.happened)} events")

    def _command_again(self) -> None:
        """Give the command again if it has ended and has not done its work."""
        if self.over or self.run.driver.poll() is None:
            return
        code = self.run.wait()
        if code != 0:
            self.say(f"the command has ended by itself: {code}")
        self._given_again(code, BUSY)

    def _given_again(self, code: int, expected: tuple[int, ...]) -> None:
        """Give the command again after it has ended with a code, unless its work is done."""
        self.over = code == 0
        if not self.over:
            if code not in expected:
                self.problems.append(
                    f"attempt {self.run.attempts} has ended with {code}: {self.run.last_words()}"
                )
            self.run.start()

    def _revive(self) -> None:
        """Start nodes that Ray gave up while they could not be reached."""
        for host in self.cluster.others:
            node = self._nodes.get(host.number)
            if host is self._away or (node and processes.is_alive(node)):
                continue
            try:
                self.cluster.revive(host)
            except (AssertionError, subprocess.SubprocessError) as error:
                self.say(
                    f"Ray does not start on host {host.number}, yet: {str(error).strip()[-200:]}"
                )
            self._nodes[host.number] = host.raylet()

    def _note(self, event: Event, whom: str = "") -> None:
        self.happened.append(event.what)
        lasts = f" for {event.seconds:.0f} s" if event.seconds else ""
        self.say(f"{event.what}{whom}{lasts}")

    def _one_of(self, event: Event, found: list[psutil.Process]) -> psutil.Process | None:
        if not found:
            self.say(f"no {event.what}: there is none")
            return None
        return found[event.of(len(found))]

    def _worker(self, event: Event) -> psutil.Process | None:
        return self._one_of(event, processes.workers(self.run.folder))

    def _kill_worker(self, event: Event) -> None:
        if worker := self._worker(event):
            self._note(event, f" (process {worker.pid})")
            send(worker, signal.SIGKILL)

    def _stop_worker(self, event: Event) -> None:
        if worker := self._worker(event):
            self._note(event, f" (process {worker.pid})")
            send(worker, signal.SIGSTOP)
            self.watch(event.seconds)
            send(worker, signal.SIGCONT)

    def _fail_worker(self, event: Event) -> None:
        if worker := self._worker(event):
            self._note(event, f" (process {worker.pid})")
            (self.run.folder / f"raise-{worker.pid}").touch()

    def _kill_controller(self, event: Event) -> None:
        if controller := self._one_of(event, processes.controllers(self.run.folder)):
            self._note(event, f" (process {controller.pid})")
            send(controller, signal.SIGKILL)

    def _drain_host(self, event: Event) -> None:
        host = self.cluster.others[event.of(2)]
        if host.raylet() is None:
            self.say(f"no {event.what}: host {host.number} is not there")
            return
        self._note(event, f" ({host.number})")
        try:
            self.cluster.drain(host, NOTICE)
        except (AssertionError, subprocess.SubprocessError) as error:
            self.problems.append(f"host {host.number} was not drained: {str(error).strip()[-200:]}")
            return
        self.watch(NOTICE)
        self._take_away(host, event.seconds)

    def _kill_host(self, event: Event) -> None:
        host = self.cluster.others[event.of(2)]
        self._note(event, f" ({host.number})")
        self._take_away(host, event.seconds)

    def _take_away(self, host: Host, seconds: float) -> None:
        self._away = host
        host.kill()
        self.watch(seconds)
        self._away = None  # at the next look it is back

    def _cut_link(self, event: Event) -> None:
        host = self.cluster.others[event.of(2)]
        self._note(event, f" (host {host.number})")
        host.link("down")
        self._away = host
        self.watch(event.seconds)
        host.link("up")
        self._away = None

    def _terminate_driver(self, event: Event) -> None:
        self._note(event)
        self.run.terminate_driver()
        try:
            code = self.run.wait(STOP)
        except AssertionError:
            self.problems.append(
                f"attempt {self.run.attempts} did not end within {STOP:.0f} s of SIGTERM"
            )
            self._kill_driver(event, noted=True)
            return
        self._given_again(code, STOPPED)

    def _kill_driver(self, event: Event, noted: bool = False) -> None:
        if not noted:
            self._note(event)
        self.run.driver.kill()
        self._given_again(self.run.wait(), KILLED)


def send(process: psutil.Process, number: signal.Signals) -> None:
    """Send a signal to a process that may be gone meanwhile."""
    with contextlib.suppress(psutil.Error):
        process.send_signal(number)
