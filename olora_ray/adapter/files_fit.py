"""Whether the stored tensors of a model folder are those of the model that its config describes.

transformers takes what it has a place for. Of the rest it says no more than a line in its own log, and numbers of 8
bits whose scales have no place it takes as they are: then another model is trained than the files hold.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olora_ray.adapter import stored
from olora_ray.adapter.stored import DTYPES, Stored
from olora_ray.adapter.weight_group import Group
from olora_ray.adapter.weight_names import follow
from olora_ray.common.errors import UserError
from olora_ray.model import misfits

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Fit:
    """What of a folder's tensors does not fit its config."""

    problem: str | None
    """Why the model would be another than the files hold, to follow "FOLDER "; None if that is not known."""
    left_out: tuple[str, ...]
    """Tensors that the model has no place for: of layers that predict further tokens, of a part that sees."""


def look(folder: Path, model: "PreTrainedModel") -> Fit:
    """Compare the headers of a folder with the model without weights; of a quantised one nothing is known here."""
    if getattr(model.config, "quantization_config", None) is not None:
        return Fit(None, ())
    try:
        places = stored.tensors(folder)
        groups, unread = follow(places, model)
    except (UserError, AttributeError, ImportError, KeyError, TypeError):  # loading says what is wrong
        return Fit(None, ())
    ignored = _ignored(model)
    left_out = {name: key for name, key in unread.items() if not ignored.search(key)}
    problem = _packed(groups, model) or _biased(folder, places, left_out, model)
    return Fit(problem, tuple(left_out))


def _ignored(model: Any) -> re.Pattern[str]:
    """Names that transformers leaves out with good reason (PreTrainedModel._adjust_missing_and_unexpected_keys)."""
    patterns = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    patterns |= {r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"}
    return re.compile("|".join(f"({pattern})" for pattern in sorted(patterns)))


def _packed(groups: Mapping[str, Group], model: "PreTrainedModel") -> str | None:
    for name, parameter in model.named_parameters():
        entries = groups[name].stored if name in groups and parameter.is_floating_point() else []
        if odd := next((entry for entry in entries if entry.dtype not in DTYPES), None):
            return misfits.packed(odd.name, odd.dtype)
    return None


def _biased(
    folder: Path, places: Mapping[str, Stored], left_out: Mapping[str, str], model: "PreTrainedModel"
) -> str | None:
    """What is wrong with a bias other than zero of a layer that has none by the config."""
    for name, key in left_out.items():
        entry = places[name]
        if misfits.is_bias(model, key) and entry.dtype in DTYPES and bool(entry.read(folder).any()):
            return misfits.bias(model, name)
    return None
