"""Pieces of work spread over the cluster by Ray Data, done by actors that load a model once."""

import logging
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from olora_ray.cluster.device import assigned_device
from olora_ray.cluster.resources import worker_resources
from olora_ray.common.errors import UserError
from olora_ray.config.evaluation import AnyConfig
from olora_ray.config.schema import Model

logger = logging.getLogger(__name__)

Work = TypeVar("Work")
Result = TypeVar("Result")

TENTHS = 10
"""Lines of progress, if there are as many works."""


def map_over_actors(
    make: Callable[[], Callable[[Work], Result]], works: Sequence[Work], config: AnyConfig
) -> list[Result]:
    """The results of all `works`, in their order; each actor calls `make` once, and what it returns once per work.

    At most cluster.workers actors, each with cluster.cpus_per_worker CPUs (its number of threads) and
    cluster.gpus_per_worker GPUs; fewer if the cluster has no room for more. `make` pickles; what it makes
    must give the same result on any actor; says so where they cannot, since `auto` means several precisions. Needs
    ray.init; raises the UserError of a work.
    """
    if not works:
        return []
    import ray.data

    from olora_ray.tokens.ray_map import quiet_stream

    wanted = worker_resources(config)
    count = min(len(works), config.cluster.max_workers())
    threads = max(1, math.floor(config.cluster.cpus_per_worker))
    with quiet_stream():
        rows = [{"number": number, "work": pickle.dumps(work)} for number, work in enumerate(works)]
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Actor,
            fn_constructor_args=(make, threads, config.model),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=count),
            num_cpus=wanted["CPU"],
            num_gpus=wanted.get("GPU", 0),
        )
        found: dict[int, bytes] = {}
        precisions = set()
        for row in done.iter_rows():
            found[row["number"]] = row["result"]
            precisions.add(row["precision"])
            if len(works) >= TENTHS and TENTHS * len(found) // len(works) > TENTHS * (len(found) - 1) // len(works):
                logger.info(f"evaluation: {len(found) / len(works):.0%} done")
    if len(precisions) > 1:
        logger.warning(
            f"model.dtype: auto: measured in {' and '.join(sorted(precisions))}, each row in that of the node which"
            " measured it; use nodes of one kind, or set it"
        )
    # Made by our own actors a moment ago.
    results = [pickle.loads(found[number]) for number in range(len(works))]  # noqa: S301
    for result in results:
        if isinstance(result, UserError):
            raise result
    return results


class _Actor:
    """Runs one work after the other; a UserError is a result, so that Ray does not wrap it."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]], threads: int, model: Model) -> None:
        from olora_ray.common.quiet import quiet_transformers
        from olora_ray.model.load import pick_dtype

        torch.set_num_threads(threads)
        quiet_transformers()
        self.problem: UserError | None = None
        self.precision = ""
        try:
            self.run = make()
            self.precision = str(pick_dtype(model, assigned_device())).removeprefix("torch.")
        except UserError as error:
            self.problem = error

    def __call__(self, batch: Any) -> dict[str, Any]:
        """One row {number, work} -> one row {number, result, precision}."""
        numbers, results = batch.column("number").to_pylist(), []
        for work in batch.column("work").to_pylist():
            try:
                results.append(pickle.dumps(self.problem or self.run(pickle.loads(work))))  # noqa: S301
            except UserError as error:
                results.append(pickle.dumps(error))
        return {"number": numbers, "result": results, "precision": [self.precision] * len(numbers)}
