"""Map over the cluster by Ray Data, with the results as an ordered stream."""

import contextlib
import logging
import pickle
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

TASKS = 4000
"""Tasks at most; with more items than that a task works on several."""


class Lazy(Sequence[Item]):
    """Items that are made one at a time, when they are looked at."""

    def __init__(self, make: Callable[[Any], Item], sources: Sequence[Any]) -> None:
        self._make, self._sources = make, sources

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, index: Any) -> Any:
        return self._make(self._sources[index])


def map_ordered(
    work: Callable[[Any, Item], Result], shared: Any, items: Sequence[Item], cpus_held: float = 0.0
) -> Generator[Result, None, None]:
    """The results of `work(shared, item)`, in the order of `items`, made by Ray Data's tasks.

    `shared` travels once to each node and is unpacked once in each process, an item to its own task only. `work`
    must be a module's function and give the same result whenever it is repeated: Ray repeats it after a failure.
    `cpus_held` are CPUs that others hold all the time. Needs ray.init; close the generator to stop early.
    """
    import ray
    import ray.data

    reference = ray.put(shared)

    def task(row: dict[str, Any]) -> dict[str, Any]:
        item = pickle.loads(row["item"])  # noqa: S301 - made by the driver a moment ago
        return {"result": pickle.dumps(work(_fetched(reference), item))}

    # Ray packs them block by block, so that the driver never holds all of them.
    packed: Any = Lazy(lambda item: {"item": pickle.dumps(item)}, items)
    with quiet_stream():
        blocks = min(len(items), TASKS)
        results = ray.data.from_items(packed, override_num_blocks=blocks).map(task, **_resources(cpus_held))
        # Closed here, in the thread that reads: Ray Data cannot stop its threads from a collector's call.
        stream: Any = iter(results.iter_batches(batch_size=None, batch_format="pyarrow"))
        with contextlib.closing(stream) as batches:
            for batch in batches:
                for result in batch.column("result"):
                    yield pickle.loads(result.as_py())  # noqa: S301 - made by our own task a moment ago


_last: tuple[Any, Any] = (None, None)


def _fetched(reference: Any) -> Any:
    """The shared object, unpacked once in a process."""
    global _last
    import ray

    if _last[0] != reference:
        _last = (reference, ray.get(reference))
    return _last[1]


def _resources(cpus_held: float) -> dict[str, Any]:
    """Resources of a task: half a CPU where others leave less than two, and none where they leave none.

    They wait for the tasks then, so the tasks must not wait for them. A process for each CPU and no more: each takes
    seconds of a CPU to start.
    """
    import ray
    import ray.data

    cpus = float(ray.cluster_resources().get("CPU", 1.0))
    each = 1.0 if cpus - cpus_held >= 2 else 0.5
    if cpus - cpus_held >= each:
        return {"num_cpus": each}
    return {"num_cpus": 0, "compute": ray.data.TaskPoolStrategy(max(1, int(cpus) // 4))}


@contextlib.contextmanager
def quiet_stream() -> Iterator[None]:
    """Ordered execution without progress bars and logs, for the time of the stream."""
    from ray.data import DataContext

    context = DataContext.get_current()
    options, loud = context.execution_options, logging.getLogger("ray.data")
    before = (
        options.preserve_order,
        context.enable_progress_bars,
        context.print_on_execution_start,
        loud.level,
        context.raise_original_map_exception,
        context.log_internal_stack_trace,
    )
    options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    loud.setLevel(logging.ERROR)
    try:
        yield
    finally:
        (
            options.preserve_order,
            context.enable_progress_bars,
            context.print_on_execution_start,
            level,
            context.raise_original_map_exception,
            context.log_internal_stack_trace,
        ) = before
        loud.setLevel(level)
