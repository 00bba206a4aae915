"""The repeated blocks of a transformer."""

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
