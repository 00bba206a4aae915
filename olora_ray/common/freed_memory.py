"""Freed memory that is given back to the system."""

import ctypes
import sys


def give_back() -> None:
    """Return what this process has freed; does nothing without glibc.

    It keeps small blocks for itself, and after the first large one that is freed also blocks of up to 32 MB: of
    thousands of arrays that were joined into one, all would stay.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
