"""How much memory is free for a model that is to be loaded besides."""

import os
from pathlib import Path

import torch

_PROC, _GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def free(device: torch.device) -> int:
    """Bytes that are free on the device; of a CPU, what the machine has and a container's limit leaves."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
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
