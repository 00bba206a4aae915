"""The process group that Train's controller asks the workers for."""

import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from olora_ray.cluster import process_group, ray_internals


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The context of a worker that has no others beside it."""
    names = ("local_rank", "local_world_size", "node_rank", "world_rank", "world_size")
    context = {f"get_{name}": lambda name=name: int(name.endswith("size")) for name in names}
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(**context))
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("alone")
def test_a_worker_joins_and_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.air._internal.torch_utils.get_devices", lambda: [torch.device("cpu")])
    address, port = place = ray_internals.meeting_place()
    ray_internals.join_process_group("gloo", 0, 1, place)
    try:
        assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (0, 1, "gloo")
        assert os.environ["MASTER_ADDR"] == address
        assert os.environ["MASTER_PORT"] == str(port)
        assert os.environ["RANK"] == "0"
        assert os.environ["WORLD_SIZE"] == "1"
    finally:
        ray_internals.leave_process_group(several=True)
    assert not dist.is_initialized()


def test_each_worker_is_asked_to_join_at_the_place_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Group:
        def __len__(self) -> int:
            return 2

        def execute_single(self, rank: int, what: object) -> tuple[str, int]:
            assert (rank, what) == (0, ray_internals.meeting_place)
            return "10.0.0.1", 1234

        def execute_single_async(self, rank: int, what: object, *given: object) -> int:
            assert what is ray_internals.join_process_group
            asked.append((rank, *given))
            return rank

    monkeypatch.setattr(process_group.ray, "get", list)
    process_group.ProcessGroup(backend="gloo").backend_cls().on_start(Group(), process_group.ProcessGroup("gloo"))
    assert asked == [(rank, "gloo", rank, 2, ("10.0.0.1", 1234)) for rank in range(2)]


def test_a_training_runs_in_rays_context_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []

    class Context:
        def __enter__(self) -> None:
            entered.append("in")

        def __exit__(self, *_: object) -> None:
            entered.append("out")

    monkeypatch.setattr("ray.train.torch.config.TorchConfigContextManager", Context)
    with process_group.ProcessGroup().train_func_context():
        assert entered == ["in"]
    assert entered == ["in", "out"]
