"""A GPU that is not there, with numbers: `cuda:0` of a torch without CUDA (gpu.cpp).

    gpu.load()                        # torch keeps the device for good: in a process of its own
    with gpu.watched() as seen:
        model.to("cuda")
    seen.waits, seen.launches

Each operator runs the CPU's kernel, so losses can be compared with the CPU's. What CUDA refuses is refused: tensors on
two devices, a generator of the CPU, `numpy()` of a tensor on the device.

It cannot show streams and asynchronous errors, kernels (their rounding, their speed, flash-attn, bitsandbytes), NCCL
itself, FSDP, or whether memory suffices. Scaled dot-product attention takes torch's own formula, of a dozen kernels.
"""

import atexit
import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("gpu.cpp")
BUILT = ROOT / "build" / "device"
PACKAGE = ROOT / "olora_ray"
COMPILER = os.environ.get("CXX", "g++")
NAME, MEMORY = "NVIDIA H100 80GB HBM3", 80 * 2**30
"""What the device says of itself; nothing enforces its memory."""


def missing() -> str | None:
    """Return why this machine cannot have the device; None if it can."""
    if torch.version.cuda or torch.version.hip:
        return "this torch brings CUDA's own kernels; the device needs one without (+cpu)"
    return None if shutil.which(COMPILER) else f"there is no compiler ({COMPILER}); set CXX"


def build() -> Path:
    """Return the compiled device for this torch, and compile it if no process has done so."""
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    BUILT.mkdir(parents=True, exist_ok=True)
    library = BUILT / f"{key}.so"
    with (BUILT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            partial = library.with_suffix(".partial")
            subprocess.run(_command(partial), check=True)
            partial.replace(library)
    return library


def _command(library: Path) -> list[str]:
    from torch.utils.cpp_extension import include_paths, library_paths

    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    places = [option for path in include_paths() for option in ("-isystem", path)]
    linked = [f"-L{path}" for path in library_paths()] + ["-lc10", "-ltorch_cpu"]
    return [
        COMPILER,
        "-O0",
        "-shared",
        "-fPIC",
        "-std=c++20",
        abi,
        *places,
        str(SOURCE),
        "-o",
        str(library),
        *linked,
    ]


# What is seen of a program that uses the device.


@dataclass
class Seen:
    """What a program asked of the device."""

    waits: Counter[str] = field(default_factory=Counter)
    """Place in the package, and what the host waited for -> how often."""
    conversions: Counter[str] = field(default_factory=Counter)
    """Where a copy to the device was converted to its type on the CPU before."""
    pageable: Counter[str] = field(default_factory=Counter)
    """Where more than 64 KiB were copied to the device from memory that is not pinned."""
    launches: int = 0
    """Kernels that a GPU would have started."""
    sent: int = 0
    """Bytes that were copied to the device."""

    def note(self, kind: str, what: str) -> None:
        counter = {"wait": self.waits, "conversion": self.conversions, "pageable": self.pageable}[
            kind
        ]
        counter[f"{_place()}: {what}"] += 1


_library: Any = None
_watching: list[Seen] = []


@contextlib.contextmanager
def watched() -> Iterator[Seen]:
    """Watch what the program asks of the device within the block; blocks may be nested."""
    seen, launches, sent = Seen(), _library.launched(), _library.bytes_sent()
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching.remove(seen)
        seen.launches, seen.sent = _library.launched() - launches, _library.bytes_sent() - sent


@ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p)
def _report(kind: bytes, what: bytes) -> None:
    for seen in _watching:
        seen.note(kind.decode(), what.decode())


def _place() -> str:
    """Return file, line and function of the package that is running."""
    frame = sys._getframe(1)
    while (back := frame.f_back) is not None:
        frame = back
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(PACKAGE):
            return f"{file.relative_to(PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"
    return "elsewhere"


# The device in torch.


def load() -> torch.device:
    """Give this process the device; it must not have run a backward pass before."""
    global _library
    if _library is None:
        import peft  # noqa: F401  # imported later, its bitsandbytes would look for CUDA's own library

        _library = ctypes.CDLL(str(build()))
        for counter in (_library.launched, _library.bytes_sent):
            counter.restype = ctypes.c_long
        for name, function in _FUNCTIONS.items():
            assert hasattr(torch.cuda, name)
            setattr(torch.cuda, name, function)
        _library.install()
        _library.watch(_report)
        atexit.register(_library.watch, None)
    return torch.device("cuda", 0)


def _answer(value: object) -> Any:
    return lambda *_, **__: value  # a function for each name: torch._dynamo allows no other


_ANSWERS: dict[str, object] = {
    "is_available": True,
    "is_bf16_supported": True,
    "device_count": 1,
    "current_device": 0,
    "get_device_name": NAME,
    "get_device_capability": (9, 0),
    "mem_get_info": (MEMORY * 7 // 8, MEMORY),
    **dict.fromkeys(
        (
            "memory_allocated",
            "max_memory_allocated",
            "memory_reserved",
            "max_memory_reserved",
        ),
        0,
    ),
    **dict.fromkeys(("_exchange_device", "_maybe_exchange_device"), 0),
    **dict.fromkeys(
        ("_lazy_init", "set_device", "synchronize", "empty_cache", "manual_seed_all"), None
    ),
    "reset_peak_memory_stats": None,
    "current_stream": None,
}


class _Event:
    """A moment of the device, which computes at once."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self, stream: object = None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: "_Event") -> float:
        return 1000.0 * (later.at - self.at)


# The device draws from the CPU's generator, so its random state is the CPU's.
_FUNCTIONS: dict[str, Any] = {name: _answer(value) for name, value in _ANSWERS.items()} | {
    "Event": _Event,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
}
