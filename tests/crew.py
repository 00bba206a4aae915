"""Real worker processes for tests: a gloo process group that runs one function after the other."""

import contextlib
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from olora_ray.common import node_cache
from olora_ray.common.errors import UserError

LIMIT = 120.0
"""Seconds after which a call counts as hung."""


IMPORTED = [
    "tests.tiny",
    "tests.tokens.helpers",
    "transformers.models.llama.modeling_llama",
    "olora_ray.train.loop",
]
"""What all of them need, which takes seconds: one process imports it, and they are forked from that one."""


class Crew:
    """`workers` processes that hold a process group together."""

    def __init__(self, workers: int) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        meeting = os.path.join(tempfile.mkdtemp(prefix="crew-"), "meeting")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(workers):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(there, meeting, rank, workers, node_cache.CACHE), daemon=True
            )
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(*arguments)` returned, or the UserError it raised, on each worker.

        Any other exception, and a worker that does not answer, fails the test and ends the crew.
        """
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(LIMIT):
                self.close()
                raise AssertionError(f"worker {rank} hangs in {function.__name__}")
            try:
                answers.append(pipe.recv())
            except EOFError:
                self.close()
                raise AssertionError(f"worker {rank} died in {function.__name__}") from None
        if broken := [answer for answer in answers if isinstance(answer, _Trace)]:
            self.close()
            raise AssertionError(broken[0].text)
        return answers

    def alive(self) -> bool:
        """Whether all processes run."""
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        """End all processes."""
        for process in self._processes:
            process.kill()
            process.join()


Crews = Callable[[int], Crew]
"""What the fixture `crew` is: so many workers, of which each number is started once."""


class _Trace:
    def __init__(self, text: str) -> None:
        self.text = text


def _serve(pipe: Connection, meeting: str, rank: int, workers: int, cache: str) -> None:
    node_cache.CACHE = cache  # what a node keeps is not the developer's
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=workers,
        timeout=timedelta(seconds=LIMIT / 2),
    )
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            pipe.send(_answer(pipe))


def _answer(pipe: Connection) -> Any:
    import traceback

    try:
        function, arguments = pipe.recv()
        return function(*arguments)
    except UserError as error:
        return error
    except EOFError:
        raise
    except BaseException:
        return _Trace(traceback.format_exc())
