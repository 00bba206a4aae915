"""Packing of several examples into one sequence: which models allow it, as far as their structure tells.

Attention stays inside an example because positions restart with it. Convolutions, state spaces and linear attention
do not stop at an example's border, nor does attention without positions. The self-test detects other cases before the
first step (train/self_test.py).
"""

import inspect
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from olora_ray.common.errors import UserError
from olora_ray.config.decided import AnyDecided

# The two parts of a causal language model: the backbone, which computes hidden states, and the head, for logits.


def backbone(model: nn.Module) -> nn.Module:
    """Return the model without its output head; raise UserError for a model that does not have these two parts."""
    return getattr(model, _backbone_name(model))  # type: ignore[no-any-return]


def _backbone_name(model: nn.Module) -> str:
    from transformers import PreTrainedModel

    prefix = getattr(model, "base_model_prefix", "")
    parts = [name for name, part in model.named_children() if isinstance(part, PreTrainedModel)]
    for name in (prefix, *parts[:1]):
        if name and isinstance(getattr(model, name, None), nn.Module):
            return str(name)
    raise UserError(
        f"model.name: {type(model).__name__} has no backbone with an output head; name a causal language model"
    )


class OutputHead:
    """A model as a function from hidden states to logits; it shares all modules and parameters with the model."""

    def __init__(self, model: nn.Module) -> None:
        name = _backbone_name(model)
        # A second object of the same class: its dictionaries are its own, what they hold is the model's.
        shell: Any = type(model).__new__(type(model))
        shell.__dict__ = dict(model.__dict__)
        shell.__dict__["_modules"] = model._modules | {name: _Given(backbone(model))}
        self._shell = shell

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden states (rows x hidden) -> logits (rows x vocabulary), with all that the family does to them."""
        logits: Tensor = self._shell.forward(inputs_embeds=hidden[None], use_cache=False).logits
        return logits[0]


class _Given(nn.Module):
    """A stand-in for the backbone that returns the embeddings that it gets."""

    def __init__(self, real: nn.Module) -> None:
        super().__init__()
        # Not a submodule: its parameters are the model's.
        self.__dict__["real"] = real

    def forward(self, *_: object, inputs_embeds: Tensor, **__: object) -> "_Output":
        return _Output(inputs_embeds)

    def __getattr__(self, name: str) -> Any:
        # The model may read anything of its backbone. A part that is a model too is replaced as well (OPT).
        from transformers import PreTrainedModel

        part = getattr(self.__dict__["real"], name)
        if isinstance(part, PreTrainedModel):
            return self
        return part


class _Output:
    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __iter__(self) -> Iterator[Tensor]:
        yield self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


# Types of layers, in configs of transformers, that pass something between tokens by attention only.
_ATTENTION = (
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "attention",
    "dense",
    "sparse",
    "moe",
)
# The function of transformers by which a family keeps padding out of everything that is not attention.
_MASKS_PADDING = "apply_mask_to_padding_states"


def why_apart(model: Any) -> str | None:
    """Return why each example needs its own row, in words that follow "the model", or None."""
    why = _carries_over(model)
    if why:
        return why
    takes = inspect.signature(backbone(model).forward).parameters
    if "position_ids" not in takes or getattr(model.config.get_text_config(), "alibi", False):
        return "takes no positions, so it cannot know where an example begins"
    return None


def _carries_over(model: Any) -> str | None:
    """Return what, beside attention, passes something between tokens, in words that follow "the model", or None."""
    types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    kinds = sorted(set(types).difference(_ATTENTION))
    if getattr(model, "_is_stateful", False) or kinds:
        return f"keeps a state from token to token ({', '.join(kinds) or type(model).__name__})"
    if any(isinstance(module, nn.Conv1d) for module in _language(model).modules()):
        return "has convolutions over the tokens"
    return None


def takes_padding(model: Any) -> bool:
    """True if a prompt may have padding before it.

    Attention leaves padding out; a state or convolution does so only if the family's code handles it (not RWKV's or
    xLSTM's).
    """
    if _carries_over(model) is None:
        return True
    return hasattr(sys.modules.get(type(model).__module__), _MASKS_PADDING)


def why_scaled(model: Any, tokens: int) -> str | None:
    """Return, as `why_apart`, why a row of so many tokens cannot have several examples.

    Layers of Llama 4 without positions use the position in the row instead of the position in the example.
    """
    shape = model.config.get_text_config()
    step = getattr(shape, "floor_scale", None)
    if not step or not getattr(shape, "attn_temperature_tuning", None) or tokens < step:
        return None
    return f"scales its attention by the position in a row, from {int(step)} tokens on"


def why_not_in_one_row(model: Any, tokens: int) -> str | None:
    """Return, as `why_apart`, why the examples of a micro-batch of so many tokens cannot share one row."""
    return why_apart(model) or why_scaled(model, tokens)


def check_lengths(model: Any, config: AnyDecided) -> None:
    """Raise UserError if sequences may exceed the model's positions, or make a loss depend on neighbours.

    The self-test has too few tokens to detect this.
    """
    family = type(model).__name__
    most = config.data.max_length
    rows = positions(model)
    if rows is not None and most > rows:
        raise UserError(
            f"data.max_length={most}: {family} has positions for {rows} tokens; set data.max_length to {rows} at most"
        )
    packed = config.data.packing
    for kind, limit in _limits_of_positions(model.config.get_text_config()):
        if most <= limit:
            continue
        shorter = f"set data.max_length to {limit} at most"
        if "dynamic" in kind:
            raise UserError(
                f"data.max_length={most}: once a sequence has more than {limit} tokens, {family} changes the positions"
                f" of all later ones ({kind}), so a loss would depend on earlier sequences; {shorter}"
            )
        if packed or config.train.micro_batch > 1:
            raise UserError(
                f"data.max_length={most}: above {limit} tokens {family} changes the positions ({kind}) of the whole"
                f" micro-batch, so one long example would change the loss of the others; {shorter}, or"
                " train.micro_batch to 1 and data.packing to false"
            )
    why = why_scaled(model, most)
    if packed and why:
        raise UserError(
            f"data.packing: {family} {why}, so a loss would depend on how many examples precede it; set"
            " data.packing: false"
        )


def positions(model: Any) -> int | None:
    """Return for how many tokens a model has positions in a table; None if it has no such limit.

    One token more is an index out of range: of learned positions (GPT-2, OPT), and of stored rotary ones (GPT-J).
    """
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    language = _language(model)
    tables = []
    for name, part in language.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(part, nn.Embedding) and ("pos" in last or last == "wpe"):
            tables.append(part.weight)
    tables += [kept for name, kept in language.named_buffers() if name.endswith("embed_positions")]
    # The tables of OPT and BioGPT have two more rows.
    if type(most) is int and any(most <= table.shape[0] <= most + 2 for table in tables):
        return most
    return None


def most_tokens(model: Any) -> int:
    """Return the tokens of the longest example that a model is made for; 131,072 if nothing says so."""
    shape = model.config.get_text_config()
    most = getattr(shape, "max_position_embeddings", None)
    limits = [2**17, *(limit for _, limit in _limits_of_positions(shape))]
    if type(most) is int:
        limits.append(most)
    return min(limits)


def _limits_of_positions(shape: Any) -> list[tuple[str, int]]:
    """Return (type, tokens) of rotary positions whose frequencies depend on the longest example above so many."""
    stored = getattr(shape, "rope_parameters", None)
    limits: list[tuple[str, int]] = []
    if not isinstance(stored, dict):
        return limits
    for each in (stored, *stored.values()):  # of the model, or of each type of its layers
        if not isinstance(each, dict):
            continue
        kind = str(each.get("rope_type"))
        if kind == "longrope":
            limits.append((kind, int(each["original_max_position_embeddings"])))
        elif "dynamic" in kind:
            limits.append((kind, int(shape.max_position_embeddings)))
    return limits


def _language(model: Any) -> nn.Module:
    # A tower for sounds or images may have convolutions, which do not matter for text.
    language: nn.Module = model
    if hasattr(model, "get_decoder"):
        decoder = model.get_decoder()
        if isinstance(decoder, nn.Module):
            language = decoder
    return language
