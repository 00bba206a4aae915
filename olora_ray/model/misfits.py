"""What a model's files may have and its config does not describe, in words."""

from collections.abc import Sequence
from typing import Any

from olora_ray.common.text import plural


def is_bias(model: Any, name: str) -> bool:
    """Whether a name, with or without the backbone's prefix, is of a bias that a layer could have, and has not."""
    owner, _, last = name.rpartition(".")
    if last != "bias":
        return False
    modules = dict(model.named_modules())
    module = modules.get(owner) or modules.get(f"{model.base_model_prefix}.{owner}")
    return module is not None and module._parameters.get("bias", module) is None


def bias(model: Any, name: str) -> str:
    """What is wrong with a folder that has such a bias, other than zero; to follow "FOLDER "."""
    return (
        f"has {name}, but by its config.json {type(model).__name__} has no such bias: it would be trained without;"
        " correct config.json (attention_bias, mlp_bias), or name a model whose files fit it"
    )


def packed(name: str, kind: str) -> str:
    """What is wrong with a folder whose tensor is of this kind of 8 bits or less; to follow "FOLDER "."""
    return (
        f"has {name} as {kind}, and no quantization_config in its config.json that says what these numbers mean; name a"
        " model in bfloat16, float16 or float32"
    )


def left_out(model: Any, names: Sequence[str], files: str) -> str:
    """The warning of tensors of these files that the model has no place for."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"model.name: {type(model).__name__} has no place for {plural(len(names), 'tensor')} in the files of {files},"
        f" and is trained without: {', '.join(names[:3])}{more}"
    )
