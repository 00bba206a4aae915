"""The two halves of a causal language model: the backbone that makes hidden states, and what makes logits of them.

Families do more to their logits than the product with the output head: they scale, divide or cap them, each by a
name of its own in its config. So no list of such names is kept here: the model's own forward is run, with a
backbone that hands back the hidden states it is given.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from olora_ray.common.errors import UserError


def backbone(model: nn.Module) -> nn.Module:
    """The model without its output head; raises UserError for a model that is not made of these two."""
    return getattr(model, _place(model))  # type: ignore[no-any-return]


def _place(model: nn.Module) -> str:
    """The attribute of the backbone."""
    from transformers import PreTrainedModel

    prefix = getattr(model, "base_model_prefix", "")
    parts = [name for name, part in model.named_children() if isinstance(part, PreTrainedModel)]
    for name in (prefix, *parts[:1]):
        if isinstance(getattr(model, name, None) if name else None, nn.Module):
            return str(name)
    raise UserError(
        f"model.name: {type(model).__name__} is not a backbone with an output head, as a causal language model is:"
        " it cannot be trained here"
    )


class OutputHead:
    """A model as a function from hidden states to logits; it shares all modules and parameters with the model."""

    def __init__(self, model: nn.Module) -> None:
        """Raises UserError as `backbone`."""
        place = _place(model)
        # A second object of the same class: its dictionaries are its own, what they hold is the model's.
        shell: Any = type(model).__new__(type(model))
        shell.__dict__ = dict(model.__dict__)
        shell.__dict__["_modules"] = model._modules | {place: _Given(backbone(model))}
        self._shell = shell

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden states (rows x hidden) -> logits (rows x vocabulary), with all that the family does to them."""
        logits: Tensor = self._shell.forward(inputs_embeds=hidden[None], use_cache=False).logits
        return logits[0]


class _Given(nn.Module):
    """Stands where the backbone is, and gives back what it is given as embeddings."""

    def __init__(self, real: nn.Module) -> None:
        super().__init__()
        # Not a submodule: its parameters are the model's.
        self.__dict__["real"] = real

    def forward(self, *_: object, inputs_embeds: Tensor, **__: object) -> "_Output":
        return _Output(inputs_embeds)

    def __getattr__(self, name: str) -> Any:
        """Whatever else the model reads of its backbone; a part that is a model too stands for the whole (OPT)."""
        from transformers import PreTrainedModel

        found = getattr(self.__dict__["real"], name)
        return self if isinstance(found, PreTrainedModel) else found


class _Output:
    """What a backbone returns: its last hidden state, and nothing else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __iter__(self) -> Iterator[Tensor]:
        yield self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
