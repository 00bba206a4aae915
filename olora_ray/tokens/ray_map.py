"""Map over the cluster by Ray Data, with the results as an ordered stream."""

import contextlib
import logging
import pickle
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

Result = TypeVar("Result")

TASKS = 4000
"""Tasks at most; with more numbers than that a task works on several."""


def map_ordered(
    work: Callable[[Any, int], Result], shared: Any, numbers: list[int], cpus_held: float = 0.0
) -> Generator[Result, None, None]:
    """The results of `work(shared, number)`, in the order of `numbers`, made by Ray Data's tasks.

    `shared` travels once to each node. `work` must be a module's function and give the same result
    whenever it is repeated: Ray repeats it after a failure. `cpus_held` are CPUs that others hold all the
    time. Needs ray.init; close the generator to stop early.
    """
    import ray
    import ray.data

    reference = ray.put(shared)

    def task(row: dict[str, Any]) -> dict[str, Any]:
        return {"result": pickle.dumps(work(_fetched(reference), int(row["item"])))}

    with quiet_stream():
        blocks = min(len(numbers), TASKS)
        results = ray.data.from_items(numbers, override_num_blocks=blocks).map(task, **_resources(cpus_held))
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
    """Resources of a task: less on a small machine, and no CPU where the holders leave none.

    They wait for the tasks then, so the tasks must not wait for them.
    """
    import ray
    import ray.data

    cpus = float(ray.cluster_resources().get("CPU", 1.0))
    each = 1.0 if cpus >= 4 else 0.5
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
