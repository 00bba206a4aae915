"""The parts of a model: its language model, what stands beside that, and its output head."""

from typing import Any

from torch import nn


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that makes logits, if the model names one."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    assert head is None or isinstance(head, nn.Module)
    return head


def other_parts(model: nn.Module) -> dict[str, str]:
    """The modules beside the language model of a model that has other parts: name -> what it is; none of a text model.

    Where the language model is, transformers says (`get_decoder`).
    """
    modules = dict(model.named_modules())
    shape: Any = getattr(model, "config", None)
    get_text_config, get_decoder = getattr(shape, "get_text_config", None), getattr(model, "get_decoder", None)
    if get_text_config is None or get_decoder is None or not _has_parts(get_text_config, shape):
        return {}
    decoder = get_decoder()
    inside = next((name for name, module in modules.items() if module is decoder), "")
    around = {".".join(inside.split(".")[:depth]) for depth in range(len(inside.split(".")) + 1)} if inside else set()
    return {
        f"{parent}.{child}".lstrip("."): child.replace("_", " ")
        for parent in sorted(around - {inside})
        for child, module in modules[parent].named_children()
        if f"{parent}.{child}".lstrip(".") not in around and module is not output_head(model)
    }


def _has_parts(get_text_config: Any, shape: Any) -> bool:
    try:
        return get_text_config(decoder=True) is not shape
    except ValueError:  # several parts that make text
        return False


def part_of(name: str, parts: dict[str, str]) -> str | None:
    """Which of the other parts something belongs to, by its name."""
    return next((what for part, what in parts.items() if f"{name}.".startswith(f"{part}.")), None)
