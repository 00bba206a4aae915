"""Biases that a model's files may have, and its config turns off."""

from typing import Any


def is_bias(model: Any, name: str) -> bool:
    """Whether a name, with or without the backbone's prefix, is of a bias that a layer could have, and has not."""
    owner, _, last = name.rpartition(".")
    if last != "bias":
        return False
    modules = dict(model.named_modules())
    module = modules.get(owner) or modules.get(f"{model.base_model_prefix}.{owner}")
    return module is not None and module._parameters.get("bias", module) is None


def problem(model: Any, name: str) -> str:
    """What is wrong with a folder that has such a bias, other than zero; to follow "FOLDER "."""
    return (
        f"has {name}, but by its config.json {type(model).__name__} has no such bias: it would be trained without;"
        " correct config.json (attention_bias, mlp_bias), or name a model whose files fit it"
    )
