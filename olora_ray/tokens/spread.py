"""Work on many items, as an ordered stream of results: by Ray Data over the cluster, or by processes of the driver."""

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from olora_ray.common.errors import TryAgain

Item = TypeVar("Item")
Result = TypeVar("Result")

# Most tasks; with more items than that a task works on several.
TASKS = 4000


class Lazy(Sequence[Item]):
    def __init__(self, make: Callable[[Any], Item], sources: Sequence[Any]) -> None:
        self._make = make
        self._sources = sources

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, index: Any) -> Any:
        return self._make(self._sources[index])


# Seconds without a result after which the tasks are suspected to wait for CPUs that others hold.
PATIENCE = 20.0


class _Stream:
    """An actor that runs a Ray Data stream: one that waits for a CPU can only be ended with its process."""

    def results(self, dataset: Any) -> Iterator[bytes]:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            for result in batch.column("result"):
                yield result.as_py()


def map_ordered(
    work: Callable[[Any, Item], Result], shared: Any, items: Sequence[Item], cpus_held: float = 0.0
) -> Generator[Result, None, None]:
    """Yield `work(shared, item)` for all items, in their order, computed by Ray Data's tasks.

    `shared` travels once to each node and is unpacked once in each process, an item only to its own task. `work` must
    be a function of a module and give the same result whenever it is repeated. `cpus_held` are CPUs that this
    run will take meanwhile. Needs ray.init; close the generator to stop early.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    reference = ray.put(shared)

    def task(row: dict[str, Any]) -> dict[str, Any]:
        item = pickle.loads(row["item"])  # noqa: S301 - made by the driver a moment ago
        return {"result": pickle.dumps(work(_fetched(reference), item))}

    # Ray's dashboard shows these names.
    task.__name__ = task.__qualname__ = getattr(work, "__name__", "work")
    node = ray.get_runtime_context().get_node_id()
    on_this_node = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    actors: list[Any] = []

    def stream(first: int, cpus: float) -> Any:
        remote: Any = ray.remote(_Stream)
        actors.append(remote.options(num_cpus=0, scheduling_strategy=on_this_node).remote())
        # Ray packs the items block by block, so that the driver never holds all of them.
        packed = Lazy(
            lambda number: {"item": pickle.dumps(items[number])}, range(first, len(items))
        )
        return actors[-1].results.remote(_dataset(packed, task, cpus))

    cpus = _cpus_of_a_task(cpus_held)
    results = stream(0, cpus)
    try:
        for number in range(len(items)):
            while not ray.wait([results], timeout=PATIENCE)[0]:
                # The CPU may be held by a run that waits for tokens itself. The tasks of the first stream continue:
                # what they have done is not done again.
                if cpus and _free_cpus() < cpus:
                    cpus = 0.0
                    results = stream(number, cpus)
            yield pickle.loads(ray.get(next(results)))  # noqa: S301 - made by our own task a moment ago
    finally:
        for actor in actors:
            ray.kill(actor)


def _dataset(packed: Any, task: Callable[[dict[str, Any]], dict[str, Any]], cpus: float) -> Any:
    """Return the dataset of the results; tasks without CPUs are few, as each process takes seconds of one to start."""
    import ray
    import ray.data

    # It runs in order, without progress bars and logs.
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    most = None
    if not cpus:
        most = max(1, int(ray.cluster_resources().get("CPU", 1.0)) // 4)
    blocks = min(len(packed), TASKS)
    results = ray.data.from_items(packed, override_num_blocks=blocks).map(
        task, num_cpus=cpus, compute=ray.data.TaskPoolStrategy(most)
    )
    results.set_name(task.__name__)
    return results


_last: tuple[Any, Any] = (None, None)


def _fetched(reference: Any) -> Any:
    # Unpacked once per process, because it may be large.
    global _last
    import ray

    if _last[0] != reference:
        _last = (reference, ray.get(reference))
    return _last[1]


def _cpus_of_a_task(cpus_held: float) -> float:
    """Return the CPUs of a task: half of one if others leave less than two, and none if they leave none."""
    # Those who hold the CPUs may wait for the tasks, so the tasks must not wait for a CPU.
    free = _free_cpus() - cpus_held
    each = 1.0 if free >= 2 else 0.5
    return each if free >= each else 0.0


def _free_cpus() -> float:
    import ray

    return float(ray.available_resources().get("CPU", 0.0))


def cores() -> int:
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit ("max")
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cores = min(cores, -(-quota // period))
    return cores


def parallel_map(
    work: Callable[[Any, Item], Result], shared: Any, items: Sequence[Item]
) -> Generator[Result, None, None]:
    """Yield what `map_ordered` does, computed by processes of this one, which end with it or with the generator.

    Raise what `work` raises, and TryAgain if one of the processes was killed.
    """
    context = multiprocessing.get_context(
        "forkserver"
    )  # a fork of this process would copy the threads' locks
    context.set_forkserver_preload([work.__module__])
    count = min(len(items), cores())
    # Each process has its own pipe, which ends with it. What all share would stay locked, or half written, if one is
    # killed in its message, and the driver would wait forever.
    pipes = []
    processes = []
    try:
        for first in range(count):
            results, theirs = context.Pipe(duplex=False)
            own = [items[number] for number in range(first, len(items), count)]
            process = context.Process(target=_work, args=(work, shared, own, theirs), daemon=True)
            with _told(), _nameless_main():
                process.start()
            theirs.close()
            pipes.append(results)
            processes.append(process)
        for number in range(len(items)):
            with _told():
                result = pipes[number % count].recv()
            if isinstance(result, Exception):
                raise result
            yield result
    finally:
        for results in pipes:
            results.close()
        for process in processes:
            process.join()


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError):  # its pipe ended before a message, or in it
        raise TryAgain(
            "a process that tokenised rows was killed; run the same command again to resume"
        ) from None


@contextlib.contextmanager
def _nameless_main() -> Iterator[None]:
    # multiprocessing would import the user's script in each process, and run what it does without a guard again.
    main: dict[str, Any] = vars(sys.modules["__main__"])
    names: dict[str, Any] = {
        name: main.pop(name) for name in ("__file__", "__spec__") if name in main
    }
    main["__spec__"] = None
    try:
        yield
    finally:
        main.update(names)


def _work(
    work: Callable[[Any, Item], Result], shared: Any, items: Sequence[Item], results: Connection
) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl+C reaches all processes of a terminal; the driver ends these
    result: Result | Exception
    with contextlib.suppress(BrokenPipeError):  # the driver wants no more, or was killed
        for item in items:
            try:
                result = work(shared, item)
            except Exception as error:
                result = error
            results.send(result)
