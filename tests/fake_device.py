"""A GPU that is not there: its tensors have a shape, a type and a place, but no numbers.

    with FakeDevice() as fake:
        model.to(fake.device)

An operation on tensors of two devices raises FakeTensorDeviceMismatchError where a GPU would raise. What asks a tensor
for a number (`item`, `tolist`, `equal`) gets a one or a truth, and is noted with its place: there a program waits for
a GPU.

Not reached: what numbers decide (the `segments` attention, FSDP), branches on `device.type == "cuda"`, kernels,
numerics, streams and NCCL.

torch registers a device for good, and while it is entered parts of torch are replaced: use it in a process of its own.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "fakegpu"
PRODUCT = Path(__file__).parents[1] / "olora_ray"
aten = torch.ops.aten


class FakeDevice:
    """The device, to be entered once."""

    def __init__(self) -> None:
        if torch._C._get_privateuse1_backend_name() != NAME:
            _register()
        self.device = torch.device(NAME, 0)
        self.waits: Counter[str] = Counter()
        """Place in the product -> how often it wanted a number from the device, or a copy on the CPU."""
        self.true_every = 1
        """Every so many truths that are asked for is true: a loop that ends with one needs some that are not."""
        self._asked = 0
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "FakeDevice":
        for owner, attribute, replacement in (
            (nn.Module, "_apply", _apply),
            (Tensor, "numpy", _numpy),
            (FakeTensor, "tolist", lambda tensor: self._tolist(tensor)),
            # Else torch.tensor(..., device=...) would want memory of the device.
            (FakeTensorMode, "avoid_device_init", True),
        ):
            self._open.enter_context(mock.patch.object(owner, attribute, replacement))
        self._open.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        self._open.enter_context(_Numbers(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def number(self, tensor: Tensor) -> bool | int | float:
        """What stands in for the number of a tensor with one element."""
        self.note(tensor)
        if tensor.dtype is torch.bool:
            self._asked += 1
            return self._asked % self.true_every == 0
        return 1.0 if tensor.is_floating_point() else 1

    def note(self, tensor: Tensor) -> None:
        """Note that the program waits for this tensor, if it lies on the device."""
        if tensor.device.type == NAME:
            self.waits[_place()] += 1

    def _tolist(self, tensor: Tensor) -> Any:
        self.note(tensor)
        return np.ones(tuple(tensor.shape), dtype=float if tensor.is_floating_point() else int).tolist()


class _Numbers(TorchDispatchMode):
    """Answers what a tensor without numbers cannot."""

    def __init__(self, fake: FakeDevice) -> None:
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation of torch."""
        if func is aten._local_scalar_dense.default:
            return self.fake.number(args[0])
        if func is aten.equal.default:
            torch.add(*args)  # refuses what `equal` would
            self.fake.note(args[0])
            return True
        if func is aten._to_copy.default and (kwargs or {}).get("device") == torch.device("cpu"):
            self.fake.note(args[0])
        return func(*args, **(kwargs or {}))


def _register() -> None:
    from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

    class Module(_DummyBackendModule):
        """`torch.fakegpu`: its random numbers have no state."""

        def get_rng_state(self, device: Any = NAME) -> Tensor:
            return torch.zeros(16, dtype=torch.uint8)

        def set_rng_state(self, state: Tensor, device: Any = NAME) -> None:
            pass

    _setup_privateuseone_for_python_backend(NAME, backend_module=Module())


def _apply(self: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply, which cannot put a fake tensor into a parameter; tied ones stay tied here too."""
    moved: dict[int, nn.Parameter] = {}
    for module in self.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in moved:
                found = function(parameter.detach())
                stays = found.device == parameter.device and found.dtype == parameter.dtype
                moved[id(parameter)] = parameter if stays else nn.Parameter(found, parameter.requires_grad)
            module._parameters[name] = None if parameter is None else moved[id(parameter)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else function(buffer)
    return self


def _numpy(tensor: Tensor, force: bool = False) -> Any:
    if tensor.device.type != "cpu":
        raise TypeError(f"can't convert {tensor.device} device type tensor to numpy; use Tensor.cpu() first")
    if not isinstance(tensor, FakeTensor):
        return _real_numpy(tensor, force=force)
    return np.zeros(tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))


_real_numpy = Tensor.numpy


def _place() -> str:
    """File and line of the product that is running."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(PRODUCT):
            return f"{file.relative_to(PRODUCT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"
