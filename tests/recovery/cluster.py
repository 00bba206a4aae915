"""A run on a cluster of several hosts, and what can happen to them while it trains."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.recovery import hosts, processes
from tests.recovery.hosts import Host
from tests.recovery.runs import Fault, Run


@dataclass
class Cluster:
    """A head, two others, and a run that is started on the head."""

    head: Host
    others: tuple[Host, Host]
    run: Run

    def host_of(self, pid: int) -> Host:
        return next(host for host in self.others if host.has(pid))

    def wait_for_step(self, step: int) -> None:
        self.run.wait_until(
            lambda: any(f"step {step}/" in line for line in self.run.lines()), f"no step {step}"
        )

    def drain(self, host: Host, seconds: int) -> None:
        """Tell Ray that a host will be taken away, as a cloud does with spot machines."""
        reason = ("--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test")
        self.head.ray(
            "drain-node",
            f"--address={hosts.head_address()}",
            f"--node-id={host.node_id()}",
            *reason,
            f"--deadline-remaining-seconds={seconds}",
        )

    def revive(self, host: Host) -> None:
        """Start a host's Ray again if its node has ended, as when Ray has given it up."""
        if host.raylet() is None:
            host.kill()
            host.start_ray()


@contextlib.contextmanager
def cluster(
    config: Path, fault: Fault, others: int = 2, changes: Sequence[str] = ()
) -> Iterator[Cluster]:
    """A cluster of which so many others than the head have Ray, with one CPU each; everything is removed on leaving."""
    with processes.scratch() as scratch, hosts.hosts(scratch, fault) as (head, *rest):
        for host in (head, *rest[:others]):
            host.start_ray()
        extra = {**head.variables, "RAY_ADDRESS": hosts.head_address()}
        run = Run(config, scratch, fault, head.enter, extra, tuple(changes))
        yield Cluster(head, (rest[0], rest[1]), run)
