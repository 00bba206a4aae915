"""Opening of a run's base model: finds it once, with its tokenizer."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from olora_ray.adapter import peft_folder, portable, stored
from olora_ray.adapter.merge import write_merged
from olora_ray.common import node_cache, storage
from olora_ray.common.errors import TryAgain, UserError, as_user_error, short_reason
from olora_ray.config.load import override
from olora_ray.config.schema import AnyConfig
from olora_ray.data.tokenize import turn_end
from olora_ray.data.tokenizer_spec import TokenizerSpec, has_tokens_beyond, spec_from_pretrained
from olora_ray.model.folder import unused_tensors
from olora_ray.model.load import end_tokens, load_tokenizer, skeleton
from olora_ray.model.packing import why_apart
from olora_ray.model.source import BaseModel, obtain
from olora_ray.tracking import models
from olora_ray.tracking.models import BaseOfAdapter, Registered

logger = logging.getLogger(__name__)

# From `model.name` to a model folder on this machine; an adapter-only version is also found as base and adapter.


def find_model(config: AnyConfig, found: Registered | None = None) -> BaseModel:
    """The base model that a config names: downloaded, fetched from the registry or converted if need be.

    `found` is the version of a models:/ name, if it was looked up already: its files are not checked twice. Raises
    UserError for a name that leads nowhere, a folder that is no model, or no place to write a converted one.
    """
    with as_user_error(f"model.name: {config.model.name} cannot be prepared", OSError, reason=_place_and_reason):
        if (found := found or models.of_config(config)) is None:
            return obtain(config, None)
        return obtain(config, found.folder if found.base is None else _merged(found, found.base, config))


def parts(found: Registered, base: BaseOfAdapter, config: AnyConfig) -> tuple[AnyConfig, BaseModel, str]:
    """An adapter-only version as a config that names its base, that base, and a place of the adapter for all nodes.

    Raises UserError if the base is not there, or another by now.
    """
    own, model = _base(found, base, config)
    if not storage.is_uri(config.run.storage):
        return own, model, str(found.folder)
    key = storage.digest_file(found.folder / peft_folder.WEIGHTS)[:16]
    place = storage.join(config.run.storage, "adapters", f"{found.version.name}-{found.version.number}-{key}")
    node_cache.upload(found.folder, place, last=peft_folder.CONFIG)
    return own, model, place


def _base(found: Registered, base: BaseOfAdapter, config: AnyConfig) -> tuple[AnyConfig, BaseModel]:
    """The base of an adapter: where it lay when the version was registered, else wherever its name leads now."""
    own, why, passes = override(config, {"model.name": base.name, "model.revision": base.revision}), "", False
    for place in (override(config, {"model.name": base.folder, "model.revision": None}), own):
        try:
            model = find_model(place)
        except UserError as error:
            passes = isinstance(error, TryAgain)
            why = f"is not found ({str(error).removeprefix('model.name: ')})"
            continue
        if base.digest == model.digest:
            return own, replace(model, name=base.name)
        why, passes = f"has other files than it was trained on, in {model.folder}", False
    what = f"{found.version.name} version {found.version.number} is an adapter of {base.name}, which {why}"
    raise TryAgain(what) if passes else UserError(f"{what}; put the base back where it was")


def _merged(found: Registered, base: BaseOfAdapter, config: AnyConfig) -> Path:
    """The folder of base and adapter merged; made once."""
    own, model = _base(found, base, config)
    content = [storage.digest_file(found.folder / name) for name in (peft_folder.CONFIG, peft_folder.WEIGHTS)]
    key = storage.digest(model.digest, *content, length=16)
    target = models.cache_folder(config) / f"merged-{key}"
    if not target.is_dir():
        logger.info(f"model.name: merging {found.version.name} version {found.version.number} into its base, once")
        with storage.staged(target) as folder:
            shape = skeleton(model, own.model)
            adapter, scale = peft_folder.read(found.folder, shape)
            write_merged(Path(model.folder), adapter, scale, folder, shape)
            portable.copy_tokenizer(found.folder, folder)
    return target


def _place_and_reason(error: BaseException) -> str:
    place = getattr(error, "filename", None)
    return f"{place}: {short_reason(error)}" if place else short_reason(error)


TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""Files of which each tokenizer has at least one."""


@dataclass(frozen=True)
class Base:
    """A base model on disk, and what turns text into its tokens."""

    model: BaseModel
    tokenizer: Any
    """The Hugging Face tokenizer."""
    spec: TokenizerSpec
    """The part of the tokenizer that other processes tokenise with."""
    eos: tuple[int, ...]
    """Token ids that end an answer."""


def open_base(config: AnyConfig) -> Base:
    """The base model and its tokenizer; raises UserError as `find_model`, and for a tokenizer that cannot be used."""
    logger.info(f"opening the base model {config.model.name}")
    return with_tokenizer(find_model(config), config)


def with_tokenizer(model: BaseModel, config: AnyConfig) -> Base:
    """A base model that was found already, with its tokenizer; raises UserError for one that cannot be used."""
    if not any((Path(model.folder) / name).is_file() for name in TOKENIZERS):
        raise UserError(
            f"model.name: {model.folder} has no tokenizer: none of {', '.join(TOKENIZERS)} is there; copy the files of"
            " the tokenizer that the model was trained with into the folder"
        )
    tokenizer = load_tokenizer(model, config.model)
    shape: Any = skeleton(model, config.model)
    found = stored.fit(Path(model.folder), shape)
    if found.problem is not None:  # what is loaded would be another model than the files hold
        raise UserError(f"model.name: {model.folder} {found.problem}")
    if found.left_out:
        logger.warning(unused_tensors(shape, found.left_out, model.name))
    if getattr(shape.config.get_text_config(), "prefix_lm", False):
        logger.warning(
            f"model.name: by its config {model.name} sees all of a prompt at once (prefix_lm); it is trained as a"
            " causal model, which sees what came before"
        )
    ends = end_tokens(model, tokenizer)
    spec = spec_from_pretrained(tokenizer, model.name, config.data.chat_template or "")
    spec = replace(spec, apart=why_apart(shape), ends=ends)
    try:
        rows: int | None = int(shape.get_input_embeddings().weight.shape[0])
    except (NotImplementedError, AttributeError):
        rows = None  # the model's code does not tell
    if rows is not None and has_tokens_beyond(tokenizer, rows):
        spec = replace(spec, embeddings=rows)
    return Base(model, tokenizer, spec, _ends(model, tokenizer, spec))


def _ends(model: BaseModel, tokenizer: Any, spec: TokenizerSpec) -> tuple[int, ...]:
    """The ids that end an answer: end tokens, and what ends an answer in chats, which is trained on."""
    found, last = spec.ends, turn_end(spec)
    if last is None or last in found:
        return found
    token = tokenizer.convert_ids_to_tokens(last)
    logger.warning(
        f"{spec.setting} ends an answer with {token!r}, which is no end token of its"
        f" tokenizer or generation_config.json: answers end there here, and a server needs it as a stop token ({last})"
    )
    return tuple(sorted((*found, last)))
