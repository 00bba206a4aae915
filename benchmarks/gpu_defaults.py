"""What the defaults are on clusters with GPUs of 80 GiB: workers, micro-batch, tokens per step, memory, idle GPUs.

Ray is real, its GPUs are pretended, and so is what NVIDIA's driver would say of them. The models have the shapes of
known ones; their files are headers without numbers. README's config is used: model and data alone.

    python benchmarks/gpu_defaults.py [--models 135M,8B] [--clusters 1,8]
"""

import argparse
import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import ray
from common import hollow, llama_shape, table
from ray.cluster_utils import Cluster

from olora_ray.cluster import preflight, resources
from olora_ray.cluster.decide import DataDecisions, decide
from olora_ray.cluster.node_facts import node_info
from olora_ray.cluster.preflight import PROCESS_BYTES
from olora_ray.common.errors import UserError
from olora_ray.config.decided import DataConfig, DecidedConfig, with_values
from olora_ray.config.load import build, override
from olora_ray.config.schema import Config
from olora_ray.model.source import BaseModel

MODELS = {
    "135M": (49152, 576, 1536, 30, 9, 3),
    "1B": (128256, 2048, 8192, 16, 32, 8),
    "8B": (128256, 4096, 14336, 32, 32, 8),
    "70B": (128256, 8192, 28672, 80, 64, 8),
}
"""Name -> vocabulary, hidden and inner size, layers, heads, heads of keys."""
CLUSTERS = {"1": (1,), "2": (2,), "8": (8,), "2 x 8": (8, 8)}
"""Name -> GPUs of each node."""
MEMORY = 80 * 2**30
MORE: tuple[dict[str, Any], ...] = ({}, {"cluster.strategy": "fsdp"}, {"model.quantization": "nf4"})
"""Settings beside the two fields, tried in this order where a model does not fit."""
HEADER = (
    *(
        "model",
        "GPUs",
        "workers",
        "micro-batch",
        "tokens at once",
        "tokens per step",
        "planned GiB",
        "idle GPUs",
    ),
    "also set",
)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS), type=lambda text: text.split(","))
    parser.add_argument("--clusters", default=",".join(CLUSTERS), type=lambda text: text.split(","))
    args = parser.parse_args(argv)
    logging.getLogger("olora_ray").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        shapes = {
            name: llama_shape(*MODELS[name]) | {"max_position_embeddings": 8192}
            for name in args.models
        }
        bases = {
            name: hollow(Path(scratch) / name, "llama", shape) for name, shape in shapes.items()
        }
        rows = [row for name in args.clusters for row in on_cluster(name, bases, scratch)]
    print(table(HEADER, sorted(rows, key=lambda row: list(MODELS).index(row[0]))))
    return 0


def on_cluster(name: str, bases: dict[str, BaseModel], storage: str) -> Iterator[tuple[str, ...]]:
    gpus = CLUSTERS[name]
    with _cluster(gpus):
        for model, base in bases.items():
            nodes = resources.schedulable_nodes()
            info = replace(node_info(), memory=2 * 10**12, gpu_memory=MEMORY, gpu_generation=(9, 0))
            answers = [(node["NodeManagerAddress"], info) for node in nodes]
            with (
                mock.patch.object(preflight, "_answers", return_value=(answers, [])),
                mock.patch.object(preflight, "gpu_problems", return_value=[]),
                mock.patch.object(preflight, "disk_problems", return_value=[]),
            ):
                yield model, name, *first_that_fits(storage, base, sum(gpus))


def first_that_fits(storage: str, base: BaseModel, gpus: int) -> tuple[str, ...]:
    for more in MORE:
        try:
            asked = override(config(storage, base), more)
            cluster = preflight.ask(asked)
            values = {"data.packing": True}
            data = DataDecisions(with_values(asked, DataConfig, values), {})
            found = decide(asked, data, base, cluster)
            preflight.require(found.config, cluster, base, found.size, found.expected)
        except UserError as error:
            refused = str(error)
            continue
        size = found.size
        row = described(found.config, size.total_bytes() + PROCESS_BYTES, size.recompute, gpus)
        return *row, ", ".join(f"{field}={value}" for field, value in more.items())
    return *(["-"] * 6), refused[:100]


def described(
    config: DecidedConfig, planned: float, recomputed: bool, gpus: int
) -> tuple[str, ...]:
    workers, micro, train = config.cluster.most, config.train.micro_batch, config.train
    busy = min(workers, train.micro_batches())
    at_once = micro * config.data.max_length
    tokens, step = (
        f"{at_once:,}{', recomputed' * bool(recomputed)}",
        train.global_batch * config.data.max_length,
    )
    return str(workers), str(micro), tokens, f"{step:,}", f"{planned / 2**30:.1f}", str(gpus - busy)


def config(storage: str, base: BaseModel) -> Config:
    return build(
        {
            "model": {"name": base.folder},
            "data": {"train": [{"path": "rows.jsonl"}]},
            "run": {"storage": storage},
        }
    )


@contextmanager
def _cluster(gpus: Sequence[int]) -> Iterator[None]:
    cluster: Any = Cluster()
    try:
        for each in gpus:
            cluster.add_node(num_cpus=max(16, each), num_gpus=each, object_store_memory=100 * 2**20)
        ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
