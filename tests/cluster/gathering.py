"""Workers without Ray that form groups: real processes, and a membership that they reach over a socket."""

import asyncio
import contextlib
import faulthandler
import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.multiprocessing as mp

from olora_ray.cluster.membership.peers import Peers
from olora_ray.cluster.membership.state import Finished, Member, Membership, Orders
from olora_ray.cluster.spec import TrainSpec
from olora_ray.cluster.worker import StopRequests, train_at
from olora_ray.cluster.worker_context import RayTrainContext
from olora_ray.common import collectives, fault_points
from olora_ray.model.source import BaseModel
from olora_ray.train import checkpoints
from tests import tiny
from tests.crew import IMPORTED

LIMIT = 300.0
"""Seconds after which a training counts as hung."""
SETTINGS: dict[str, Any] = {
    "train__steps": 8,
    "train__global_batch": 6,
    "train__micro_batch": 1,
    "train__checkpoint_every": 3,
    "train__eval_every": 2,
    "evaluation__samples": 1,
    "evaluation__max_new_tokens": 2,
    "adapter__dropout": 0.1,
}


def died(member: Member) -> bool:
    """Whether the process is gone whose number the member's name is."""
    try:
        return Path(f"/proc/{member.name}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (OSError, IndexError):
        return True


class Place:
    """The membership, served over a socket to worker processes."""

    def __init__(self, wanted: int) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.membership = Membership(wanted, died)
        self.asked_to_leave = 0
        """How often a worker was answered that it has to leave; it asks again only when it has noted the answer."""
        self._listener = Listener()
        self.address: Any = self._listener.address
        threading.Thread(target=self._accept, daemon=True).start()

    def do(self, name: str, *arguments: Any) -> Any:
        """Call a method of the membership in its loop."""
        return asyncio.run_coroutine_threadsafe(getattr(self.membership, name)(*arguments), self.loop).result()

    def _accept(self) -> None:
        while True:
            connection = self._listener.accept()
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: Connection) -> None:
        with connection, contextlib.suppress(EOFError, OSError):
            name, arguments = connection.recv()
            try:
                answer = self.do(name, *arguments)
            except (Finished, ConnectionError) as error:
                answer = error
            self.asked_to_leave += isinstance(answer, Orders) and answer.leave
            connection.send(answer)


def through(address: Any) -> Callable[..., Any]:
    """A worker's way to the membership."""

    def call(name: str, *arguments: Any) -> Any:
        with Client(address) as connection:
            connection.send((name, arguments))
            answer = connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    return call


class Context(RayTrainContext):
    """That of a worker of Ray Train, without Ray."""

    def __init__(self) -> None:
        self.device, self._loss, self._installed = torch.device("cpu"), None, False

    def preemption_announced(self) -> bool:
        return False


@dataclass(frozen=True)
class Fault:
    """What a worker does to itself at a fault point."""

    point: str
    step: int | None
    what: str
    """`kill`, `stop`, `raise`, or `wait`: until the file `go` is there."""


@dataclass
class Workers:
    """Worker processes of one training."""

    folder: Path
    model: Path
    wanted: int
    changes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.place = Place(self.wanted)
        self.processes: list[Any] = []

    def start(self, *faults: Fault, node: str = "") -> None:
        """One more."""
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        rank = len(self.processes)
        arguments = (self.place.address, rank, self.folder, self.model, self.changes, faults, node)
        process = context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        self.processes.append(process)

    def wait(self, *ranks: int) -> list["Outcome"]:
        """What these workers have trained."""
        end = time.monotonic() + LIMIT
        for rank in ranks:
            self.processes[rank].join(max(0.0, end - time.monotonic()))
            assert self.processes[rank].exitcode == 0, f"worker {rank}: {self.stacks()}"
        return [Outcome(**json.loads((self.folder / f"outcome-{rank}.json").read_text())) for rank in ranks]

    def told(self) -> list[str]:
        """All groups, as the first worker of each has told the driver."""
        file = self.folder / "told"
        return file.read_text().splitlines() if file.exists() else []

    def wait_for(self, condition: Any) -> None:
        """Until something is so."""
        end = time.monotonic() + LIMIT
        while not condition():
            assert time.monotonic() < end, self.stacks()
            time.sleep(0.02)

    def stacks(self) -> str:
        """Where everybody is, for the message of a test that hangs: it may take a thousand runs to see it again."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(1)
        place, ended = self.place.membership, [process.exitcode for process in self.processes]
        lines = [f"{self.told()}, {place.phase}, {place.group}, waiting: {[*place.waiting]}, exit codes: {ended}"]
        return "\n".join([*lines, *(file.read_text() for file in sorted(self.folder.glob("stacks-*")))])

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@contextlib.contextmanager
def workers(folder: Path, model: Path, wanted: int, **changes: Any) -> Iterator[Workers]:
    """Ended on leaving."""
    found = Workers(folder, model, wanted, changes)
    try:
        yield found
    finally:
        found.close()


@dataclass(frozen=True)
class Outcome:
    """What must be the same whatever happened."""

    adapter: str
    optimizer: str
    rows: list[list[float]]
    answers: list[Any]
    interrupted: str | None


def _work(
    address: Any, rank: int, folder: Path, model: Path, changes: dict[str, Any], faults: tuple[Fault, ...], node: str
) -> None:
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1, (folder / f"stacks-{rank}").open("w"))
    fault_points.handler = lambda point, step, _: _reach(folder, faults, point, step)
    settings = tiny.config(**(SETTINGS | {"model__name": str(model), "model__dtype": "float32"} | changes))
    train: Any = tiny.store(8)
    held_out: Any = tiny.store(5, seed=9)
    spec = TrainSpec(settings, BaseModel("m", str(model), "base"), "tokenizer", (1,), train, held_out)
    StopRequests._listen = lambda self: None  # type: ignore[method-assign]
    member = Member(str(os.getpid()), rank, collectives.meeting_place("127.0.0.1"), node)
    kept: dict[str, Any] = {}
    _keep_worker(kept)
    with Peers(through(address), member) as peers:
        result = train_at(Context(), spec, str(folder / "checkpoints"), _channel(folder), peers)
    assert result.problem is None, result.problem
    trainer, best = kept["worker"].trainer, kept["worker"].evaluator.best
    rows = [] if result.state is None else [[row["step"], *_repeatable(row)] for row in result.state.history]
    outcome = Outcome(
        _digest([trainer.flat.vector, *([] if best is None else [best]), *_last_adapter(folder)]),
        _digest(list(trainer.optimizer.moments.values())),
        rows,
        [[list(pair.before), list(pair.after)] for pair in result.answers],
        result.interrupted,
    )
    (folder / f"outcome-{rank}.json").write_text(json.dumps(vars(outcome)))


def _last_adapter(folder: Path) -> list[torch.Tensor]:
    """That of the last checkpoint."""
    newest = checkpoints.latest_good(str(folder / "checkpoints"))
    parts = [] if newest is None else [part for one in newest[1].adapter.values() for part in (one.da, one.db)]
    assert any(part.any() for part in parts)
    return parts


def _keep_worker(kept: dict[str, Any]) -> None:
    from olora_ray.cluster import worker

    make = worker.Worker.__init__

    def init(self: Any, *arguments: Any, **named: Any) -> None:
        make(self, *arguments, **named)
        kept["worker"] = self

    worker.Worker.__init__ = init  # type: ignore[method-assign]


def _repeatable(row: dict[str, float]) -> list[float]:
    return [row[name] for name in ("train/loss", "train/grad_norm", "eval/loss") if name in row]


def _digest(tensors: list[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _channel(folder: Path) -> Any:
    def send(message: Any) -> None:
        if why := getattr(message, "why", None):
            with (folder / "told").open("a") as file:
                file.write(f"{why}: {message.workers} after {message.step}\n")

    return SimpleNamespace(send=SimpleNamespace(remote=send))


def _reach(folder: Path, faults: tuple[Fault, ...], point: str, step: int | None) -> None:
    with (folder / f"reached-{os.getpid()}").open("a") as file:
        file.write(f"{point} {step}\n")
    for fault in faults:
        if fault.point == point and fault.step in (None, step):
            (folder / f"{fault.what}-{point}-{step}").touch()
            if fault.what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault.what == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if fault.what == "raise":
                raise RuntimeError("a fault")
            while fault.what == "wait" and not (folder / "go").exists():
                time.sleep(0.01)
