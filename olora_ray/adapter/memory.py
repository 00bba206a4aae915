"""How much memory is free for a model that is to be loaded besides."""

import os
from pathlib import Path

import torch

SHARE = 0.4
"""Share of the free memory that a model may take which is loaded to measure something."""
ON_THE_WAY = 0.8
"""Share of a node's free memory that a model may take which goes on to a GPU: nothing more is made of it there."""
_CPU = torch.device("cpu")
_PROC, _GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def too_large(parameters: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a model of so many parameters is not to be loaded on the device, or None."""
    need, where = parameters * dtype.itemsize, None
    if need > SHARE * free(device):
        where = f"the memory of one {device.type}"
    elif device != _CPU and need > ON_THE_WAY * free(_CPU):
        where = f"the memory of the node, by which it comes to the {device.type}"
    if where is None:
        return None
    kind = str(dtype).removeprefix("torch.")
    return f"in {kind} the model has {need / 2**30:.1f} GiB, too large for {where}"


def free(device: torch.device) -> int:
    """Bytes that are free on the device; of a CPU, what the machine has and a container's limit leaves."""
    if device.type == "cuda":
        # What torch keeps of memory that it has given up counts as used, and is taken first.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    found = _of_machine()
    try:
        limit, used = (int((_GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        # The cache of files counts as used, and is given up when it is asked for.
        cached = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        found = min(found, limit - used + int(cached.get("inactive_file", 0)))
    except (OSError, ValueError):  # no container, or no limit ("max")
        pass
    return max(found, 0)


def _of_machine() -> int:
    if not _PROC.is_file():  # not Linux: half of the memory is a guess
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    sizes = dict(line.split(":", 1) for line in _PROC.read_text().splitlines())
    return int(sizes["MemAvailable"].split()[0]) * 1024
