"""Memory of a process's GPU, and the errors of a GPU."""

from typing import Any

import torch

SHORT = 2**29
"""Free bytes below which a GPU is short of memory: libraries ask for up to some hundred MiB at once."""
_accelerator: Any = getattr(torch, "AcceleratorError", torch.OutOfMemoryError)  # since torch 2.8


def memory_of(device: torch.device) -> tuple[int, int] | None:
    """Return the free bytes of a GPU, and all; None for a CPU, or if the GPU does not answer after an error."""
    if device.type != "cuda":
        return None
    try:
        return torch.cuda.mem_get_info(device)
    except RuntimeError:
        return None


def is_short(device: torch.device) -> bool:
    memory = memory_of(device)
    return memory is not None and memory[0] < SHORT


def is_out_of_memory(error: BaseException) -> bool:
    """True if torch itself lacked memory. A worker that the kernel kills for its memory dies without an exception."""
    return isinstance(
        error, torch.OutOfMemoryError
    ) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def lacks_memory(error: BaseException, device: torch.device) -> bool:
    """True if an error comes from a lack of memory.

    Each library beside torch has an error of its own for it (cuBLAS, cuSOLVER, Triton, NCCL, and there will be
    others), so the GPU is asked instead of the error.
    """
    return is_out_of_memory(error) or (isinstance(error, RuntimeError) and is_short(device))


def is_of_gpu(error: BaseException) -> bool:
    """True for an error of this process's GPU; some others of its libraries are plain RuntimeErrors."""
    # NCCL says by this name that a call to the own GPU has failed, and by other names that another worker has.
    return isinstance(
        error, _accelerator | torch.OutOfMemoryError
    ) or "ncclUnhandledCudaError" in str(error)
