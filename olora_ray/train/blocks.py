"""The blocks of a model: those of its language model, and all that are sharded one by one."""

from collections.abc import Iterator
from typing import Any

from torch import nn


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The blocks of the language model, in their order: the longest ModuleList that lies in no other.

    Inside of a block there may be longer ones, of experts; beside the language model there may be a tower for images.
    """
    get: Any = getattr(model, "get_decoder", None)
    decoder = get() if callable(get) else None
    found: list[nn.ModuleList] = []
    waiting: list[nn.Module] = [decoder if isinstance(decoder, nn.Module) else model]
    while waiting:
        module = waiting.pop()
        if isinstance(module, nn.ModuleList):
            found.append(module)
        else:
            waiting.extend(module.children())
    return list(max(found, key=len, default=[]))


def blocks_to_shard(model: nn.Module) -> list[nn.Module]:
    """The modules that are gathered one at a time: those that the model itself says are not to be split.

    Without such a list, or where it does not tell the blocks of the language model apart, only these. A module that
    shares a weight with another outside of it (an embedding with the head) is left to the whole.
    """
    layers = decoder_layers(model)
    named = [module for module in _outermost(model) if _is_closed(model, module)]
    inside = [{id(part) for part in module.modules()} for module in named]
    held = [sum(id(layer) in parts for layer in layers) for parts in inside]
    return named if sum(held) == len(layers) and max(held, default=0) <= 1 else layers


def _outermost(model: nn.Module) -> Iterator[nn.Module]:
    """Modules of the classes that are not to be split, in the model's order, none in another."""
    classes: Any = getattr(model, "_no_split_modules", None) or ()
    waiting = list(model.children())[::-1]
    while waiting:
        module = waiting.pop()
        if type(module).__name__ in classes:
            yield module
        else:
            waiting.extend(list(module.children())[::-1])


def _is_closed(model: nn.Module, module: nn.Module) -> bool:
    """Whether it has weights, all of its own."""
    own = {id(parameter) for parameter in module.parameters()}
    inside = {id(part) for part in module.modules()}
    outside = (part for part in model.modules() if id(part) not in inside)
    return bool(own) and not any(id(one) in own for part in outside for one in part.parameters(recurse=False))
