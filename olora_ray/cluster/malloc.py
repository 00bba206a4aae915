"""Settings of the C library's allocator that keep freed memory in the process.

A training step allocates and frees the same hundreds of megabytes each time. glibc returns large blocks
to the system at once and meets them again as page faults: 127,000 per step of 1,024 tokens of a small model,
15 % of its time. PyTorch has a pool of its own on accelerators, but none on CPUs.
"""

import ctypes
import sys

# mallopt's parameters, from malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
ONE_POOL = {"MALLOC_ARENA_MAX": "1"}
"""Environment of a process whose threads take turns: else each of them keeps the memory of a step for itself. glibc
looks at it when the process starts; later, threads that are there have pools already."""


def keep_freed_memory() -> None:
    """Let this process reuse freed memory instead of returning it; does nothing without glibc."""
    if sys.platform != "linux" or not hasattr(library := ctypes.CDLL(None), "gnu_get_libc_version"):
        return
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    library.mallopt(_TOP_PAD, 2**26)
