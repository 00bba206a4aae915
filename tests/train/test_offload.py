"""A sharded base with blocks in the node's memory gives the same bits as one with blocks on the device."""

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from olora_ray.adapter.initialise import at_scale, initialise, options_of
from olora_ray.adapter.inject import find_targets, install, wrap
from olora_ray.train import parallel
from olora_ray.train.loop import Trainer, evaluate
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.parallel import place_model, target_device
from tests import tiny
from tests.crew import Crew
from tests.families import zoo
from tests.families.variants import ALL
from tests.train.test_sharded_base import config

CPU, META = torch.device("cpu"), torch.device("meta")
Found = tuple[list[float], Tensor, float]
"""Losses of the steps, the adapter after them, and the held-out loss."""


def made(folder: Path, offload: bool, device: torch.device, by_rows: bool = True) -> Trainer:
    """Return a worker's trainer; `by_rows`: each worker reads only its part, otherwise it loads the whole base."""
    settings = config(folder, "fsdp", cluster__fsdp_offload=offload)
    if by_rows:
        loss = parallel.load_base(str(folder), settings, device)
        assert loss.read_rows is not None
    else:
        loss = SupervisedLoss(zoo.make(ALL["llama"]))
    adapter = settings.adapter
    targets = find_targets(zoo.make(ALL["llama"]), adapter.targets, adapter.rank)
    factors, _ = initialise(
        targets, adapter.method, adapter.rank, settings.run.seed, CPU, options_of(adapter)
    )
    adapted = wrap(loss.model, at_scale(factors, adapter), adapter.scale(), adapter.dropout)
    install(loss.model, adapted)
    if not by_rows:
        parallel.shard(loss, device, 1, offload)
    place_model(loss, "fsdp", device, 1, offload)
    return Trainer(loss, adapted, settings, device)


def trained(trainer: Trainer) -> Found:
    """Alternate evaluations and steps, as in a training."""
    rank, world = dist.get_rank(), dist.get_world_size()
    attention = tiny.attention_of(trainer.loss.model)
    losses = [result.loss for result in tiny.steps(trainer, attention=attention)]
    return (
        losses,
        trainer.flat.vector.cpu().clone(),
        evaluate(trainer, tiny.store(5, seed=9), attention, rank, world),
    )


def in_turn(folder: Path, by_rows: bool) -> tuple[Found, Found, int, set[str], set[str]]:
    """Return results without and with offload on a CPU that claims to have memory of its own."""
    with mock.patch.object(parallel, "has_own_memory", return_value=True):
        plain = trained(made(folder, offload=False, device=CPU, by_rows=by_rows))
        trainer = made(folder, offload=True, device=CPU, by_rows=by_rows)
        found = trained(trainer)
    place = target_device(trainer.loss, META)  # as if that were a GPU
    inside = [part for block in trainer.loss.offloaded for part in block.parameters()]
    shards = {id(part) for part in inside if isinstance(part, DTensor)}
    others = [
        part
        for part in (*trainer.loss.parameters(), *trainer.loss.buffers())
        if id(part) not in shards
    ]
    assert any(
        part.requires_grad for part in others
    )  # adapters lie in blocks and are not offloaded
    return (
        plain,
        found,
        len(trainer.loss.offloaded),
        {place(part).type for part in inside if id(part) in shards},
        {place(part).type for part in others},
    )


def assert_same(found: Found, plain: Found) -> None:
    assert found[0] == plain[0]
    assert torch.equal(found[1], plain[1])
    assert found[2] == plain[2]


@pytest.mark.parametrize("by_rows", [True, False])
def test_offloaded_blocks_change_no_byte(
    crew: Callable[[int], Crew], tmp_path: Path, by_rows: bool
) -> None:
    zoo.build(ALL["llama"], tmp_path)
    for plain, found, blocks, shards, others in crew(2).run(in_turn, tmp_path, by_rows):
        assert_same(found, plain)
        assert blocks == 2
        assert (shards, others) == ({"cpu"}, {"meta"})


def test_without_a_gpu_there_is_nothing_to_offload() -> None:
    assert not parallel.has_own_memory(CPU)
    assert parallel.has_own_memory(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("by_rows", [True, False])
def test_on_a_gpu_too(tmp_path: Path, by_rows: bool) -> None:
    zoo.build(ALL["llama"], tmp_path)
    device = torch.device("cuda", 0)
    store = dist.FileStore(str(tmp_path / "meeting"), 1)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    try:
        plain = trained(made(tmp_path, offload=False, device=device, by_rows=by_rows))
        trainer = made(tmp_path, offload=True, device=device, by_rows=by_rows)
        assert_same(trained(trainer), plain)
        for block in trainer.loss.offloaded:
            block.reshard()
            shards = [
                part.data.to_local()
                for part in block.parameters()
                if isinstance(part.data, DTensor)
            ]
            assert shards
            assert all(part.device.type == "cpu" and part.is_pinned() for part in shards)
        assert all(part.device == device for part in trainer.loss.buffers())
    finally:
        dist.destroy_process_group()
