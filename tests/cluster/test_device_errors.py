"""Errors of a device: which of them end a run, and which may pass with a restart."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from olora_ray.cluster.device_errors import advice_for_device
from olora_ray.common import collectives
from olora_ray.common.collectives import PeerLost
from olora_ray.common.errors import UserError
from olora_ray.train.checkpoint import TrainState
from tests import tiny

GPU = torch.device("cuda", 0)
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
ASSERTED = torch.AcceleratorError("CUDA error: device-side assert triggered")
CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
NCCL = dist.DistBackendError(
    "NCCL error in: NCCLUtils.cpp:77, unhandled cuda error, NCCL version 2.29.7\nncclUnhandledCudaError: Call to CUDA"
    " function failed.\nLast error:\nFailed to CUDA calloc async 25165824 bytes"
)
REMOTE = dist.DistBackendError("NCCL error in: NCCLUtils.cpp:77, ncclRemoteError: A call failed")


@pytest.mark.parametrize(
    ("error", "free", "began", "done", "told"),
    [
        (NO_MEMORY, 2**33, 0, 900, "train.micro_batch=1"),  # a longer batch than before
        (CUBLAS, 2**20, 0, 0, "train.micro_batch=1"),
        (CUBLAS, 2**20, 500, 501, "train.micro_batch=1"),  # a resumed run, on a smaller GPU
        (CUBLAS, 2**20, 0, 900, None),  # its memory is full as always: the next attempt tells
        (ASSERTED, 2**33, 0, 1, "another node"),
        (ASSERTED, 2**33, 500, 500, None),  # ran before, so another GPU may do
        (REMOTE, 2**20, 0, 0, None),
    ],
)
def test_what_would_come_again_ends_the_run(
    error: RuntimeError, free: int, began: int, done: int, told: str | None
) -> None:
    def train() -> None:
        state = TrainState(step=began)
        config = tiny.decided(train__micro_batch=2)
        with advice_for_device(config, GPU, 61 * 2**30) as progress:
            progress.state = state
            progress.began = began
            state.step = done
            raise error

    memory = mock.patch.object(torch.cuda, "mem_get_info", return_value=(free, 80 * 2**30))
    with memory, pytest.raises(UserError if told else type(error), match=told):
        train()


def test_a_gpu_that_does_not_answer_any_more_is_told_without_its_memory() -> None:
    silent = mock.patch.object(torch.cuda, "mem_get_info", side_effect=ASSERTED)
    with silent, pytest.raises(UserError), advice_for_device(tiny.decided(), GPU):
        raise ASSERTED


def test_on_a_cpu_an_error_of_torch_keeps_its_type() -> None:
    with pytest.raises(RuntimeError, match="shapes"), advice_for_device(tiny.decided(), tiny.CPU):
        raise RuntimeError("shapes")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (NO_MEMORY, torch.OutOfMemoryError),
        (NCCL, dist.DistBackendError),
        (REMOTE, PeerLost),
        (RuntimeError("Connection closed by peer"), PeerLost),
    ],
)
def test_only_an_error_of_another_worker_is_a_lost_peer(
    error: RuntimeError, expected: type[Exception]
) -> None:
    two = mock.patch.object(collectives, "world_size", return_value=2)
    failing = mock.patch.object(dist, "all_reduce", side_effect=error)
    with two, failing, pytest.raises(expected):
        collectives.sum_in_place(torch.zeros(1))
