"""Whether a model can take several examples in one sequence, as far as its structure tells.

Attention is kept inside an example by positions that start anew. What else carries something from one token to the
next does not stop there: convolutions, state spaces, linear attention; nor does attention that is not told the
positions. What the structure does not tell, the self-test finds before the first step (train/self_test.py).
"""

import inspect
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from olora_ray.common.errors import UserError
from olora_ray.config.schema import AnyConfig

# The two halves of a causal language model: the backbone that makes hidden states, and what makes logits of them.


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


_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention", "attention", "dense", "sparse", "moe")
"""Kinds of layers, as configs of transformers list them, that carry nothing over but by attention."""
_MASKS_PADDING = "apply_mask_to_padding_states"
"""What transformers calls the function by which a family leaves padding out of all that is not attention."""


def why_apart(model: Any) -> str | None:
    """Why every example of this model needs a row of its own, in words that follow "the model"; None: it does not."""
    config = model.config.get_text_config()
    if why := _carries_over(model):
        return why
    if "position_ids" not in inspect.signature(backbone(model).forward).parameters or getattr(config, "alibi", False):
        return "takes no positions, so it cannot know where an example begins"
    return None


def _carries_over(model: Any) -> str | None:
    """What beside attention carries something from one token to the next, in words that follow "the model"."""
    kinds = sorted(set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - set(_ATTENTION))
    if getattr(model, "_is_stateful", False) or kinds:
        return f"keeps a state from token to token ({', '.join(kinds) or type(model).__name__})"
    if any(isinstance(module, nn.Conv1d) for module in _language(model).modules()):
        return "has convolutions over the tokens"
    return None


def takes_padding(model: Any) -> bool:
    """Whether a prompt may have padding before it.

    Attention leaves that out; a state or convolution does if the family's code sees to it (not RWKV's or xLSTM's).
    """
    return _carries_over(model) is None or hasattr(sys.modules.get(type(model).__module__), _MASKS_PADDING)


def why_scaled(model: Any, tokens: int) -> str | None:
    """As `why_apart`, of a row of so many tokens.

    Where a layer of Llama 4 has no positions it takes the place in the row for them, whatever it is told.
    """
    shape = model.config.get_text_config()
    step = getattr(shape, "floor_scale", None)
    if not step or not getattr(shape, "attn_temperature_tuning", None) or tokens < step:
        return None
    return f"scales its attention by the place in a row, from {int(step)} tokens on"


def why_not_in_one_row(model: Any, tokens: int) -> str | None:
    """As `why_apart`, but for the examples of a micro-batch of so many tokens that follow each other in one row."""
    return why_apart(model) or why_scaled(model, tokens)


def shares_sequences(model: Any, config: AnyConfig) -> bool:
    """Whether data.packing puts several examples of this model in one sequence, where they have room."""
    return config.data.packing is True or (config.data.packing == "auto" and why_apart(model) is None)


def check_lengths(model: Any, config: AnyConfig) -> None:
    """Raise UserError where sequences may be so long that the loss of one of this model depends on its neighbours.

    Or longer than its positions. The self-test has too few tokens to see it.
    """
    family, most = type(model).__name__, config.data.length()
    if (there := positions(model)) is not None and most > there:
        raise UserError(
            f"data.max_length={most}: {family} has positions for {there} tokens; set data.max_length to {there} at most"
        )
    packed = shares_sequences(model, config)
    for kind, limit in _limits_of_positions(model.config.get_text_config()):
        if most <= limit:
            continue
        shorter = f"set data.max_length to {limit} at most"
        if "dynamic" in kind:
            raise UserError(
                f"data.max_length={most}: {family} encodes positions by the longest sequence so far once one has more"
                f" than {limit} tokens ({kind}), so that a loss would depend on the sequences before; {shorter}"
            )
        if packed or config.train.micro_batch > 1:
            raise UserError(
                f"data.max_length={most}: {family} encodes positions otherwise in all of a micro-batch if one of its"
                f" examples has more than {limit} tokens ({kind}), so that a loss would depend on the neighbours;"
                f" {shorter}, or train.micro_batch to 1 and data.packing to false"
            )
    if packed and (why := why_scaled(model, most)):
        raise UserError(
            f"data.packing: {family} {why}, so that a loss would depend on how many examples come before; set"
            " data.packing: false"
        )


def positions(model: Any) -> int | None:
    """Tokens for which a model has positions, where it looks these up in a table; None where there is no end of them.

    One token more is an index out of range: of learned positions (GPT-2, OPT), and of kept rotary ones (GPT-J).
    """
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    language = _language(model)
    tables: list[Any] = []
    for name, part in language.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(part, nn.Embedding) and ("pos" in last or last == "wpe"):
            tables.append(part.weight)
    tables += [kept for name, kept in language.named_buffers() if name.endswith("embed_positions")]
    # Those of OPT and BioGPT have two rows more.
    return most if type(most) is int and any(most <= table.shape[0] <= most + 2 for table in tables) else None


def most_tokens(model: Any) -> int:
    """Tokens of the longest example that a model is made for; 131,072 where nothing says so."""
    shape = model.config.get_text_config()
    most = getattr(shape, "max_position_embeddings", None)
    return min(most if type(most) is int else 2**17, *(limit for _, limit in _limits_of_positions(shape)), 2**17)


def _limits_of_positions(shape: Any) -> list[tuple[str, int]]:
    """(kind, tokens) of rotary positions whose frequencies follow from the longest example, beyond so many tokens."""
    stored = getattr(shape, "rope_parameters", None)
    stored = stored if isinstance(stored, dict) else {}
    found = []
    for each in (stored, *stored.values()):  # of the model, or of each kind of its layers
        kind = str(each.get("rope_type")) if isinstance(each, dict) else ""
        if kind == "longrope":
            found.append((kind, int(each["original_max_position_embeddings"])))
        elif "dynamic" in kind:
            found.append((kind, int(shape.max_position_embeddings)))
    return found


def _language(model: Any) -> nn.Module:
    """The part that works on text: a tower for sounds or images may have convolutions."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return decoder if isinstance(decoder, nn.Module) else model
