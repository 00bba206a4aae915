"""Opening of a run's base model: finds it once, with its tokenizer."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from olora_ray.adapter import files_fit
from olora_ray.common.errors import UserError
from olora_ray.config.evaluation import AnyConfig
from olora_ray.data.token_ids import has_tokens_beyond
from olora_ray.data.tokenizer_spec import TokenizerSpec, spec_from_pretrained
from olora_ray.data.turn_end import turn_end
from olora_ray.model import misfits
from olora_ray.model.load import end_tokens, load_tokenizer, skeleton
from olora_ray.model.packing import why_apart
from olora_ray.model.source import BaseModel
from olora_ray.pipeline.find_model import find_model

logger = logging.getLogger(__name__)

TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""Files of which each tokenizer has at least one."""


@dataclass(frozen=True)
class Base:
    """A base model on disk, and what turns text into its tokens."""

    model: BaseModel
    tokenizer: Any
    """The Hugging Face tokenizer."""
    spec: TokenizerSpec
    """What tokenising in other processes needs of it."""
    eos: tuple[int, ...]
    """Token ids that end an answer."""


def open_base(config: AnyConfig) -> Base:
    """The base model and its tokenizer; raises UserError as `find_model`, and for a tokenizer that cannot be used."""
    return with_tokenizer(find_model(config), config)


def with_tokenizer(model: BaseModel, config: AnyConfig) -> Base:
    """A base model that was found already, with its tokenizer; raises UserError for one that cannot be used."""
    if not any((Path(model.folder) / name).is_file() for name in TOKENIZERS):
        raise UserError(
            f"model.name: {model.folder} has no tokenizer: none of {', '.join(TOKENIZERS)} is there; copy the files of"
            " the tokenizer that the model was trained with into the folder"
        )
    tokenizer = load_tokenizer(model, config.model)
    shape = skeleton(model, config.model)
    _check_fit(model, shape)
    spec = replace(spec_from_pretrained(tokenizer, model.name), apart=why_apart(shape))
    if (rows := _embeddings(shape)) is not None and has_tokens_beyond(tokenizer, rows):
        spec = replace(spec, embeddings=rows)
    return Base(model, tokenizer, spec, _ends(model, tokenizer, spec))


def _check_fit(model: BaseModel, shape: Any) -> None:
    """Raise UserError where what is loaded would be another model than the files hold; say what is left out."""
    found = files_fit.look(Path(model.folder), shape)
    if found.problem is not None:
        raise UserError(f"model.name: {model.folder} {found.problem}")
    if names := found.left_out:
        logger.warning(misfits.left_out(shape, names, model.name))


def _ends(model: BaseModel, tokenizer: Any, spec: TokenizerSpec) -> tuple[int, ...]:
    """The ids that end an answer: end tokens, and what ends an answer in chats, which is trained on."""
    found, last = end_tokens(model, tokenizer), turn_end(spec)
    if last is None or last in found:
        return found
    token = tokenizer.convert_ids_to_tokens(last)
    logger.warning(
        f"model.name: the chat template of {model.name} ends an answer with {token!r}, which is no end token of its"
        f" tokenizer or generation_config.json: answers end there here, and a server needs it as a stop token ({last})"
    )
    return tuple(sorted((*found, last)))


def _embeddings(shape: Any) -> int | None:
    """Rows of a model's embeddings of tokens; None where its code does not tell."""
    try:
        return int(shape.get_input_embeddings().weight.shape[0])
    except (NotImplementedError, AttributeError):
        return None
