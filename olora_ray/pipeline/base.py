"""The base model of a run and its tokenizer, found and checked once by the driver."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from olora_ray.adapter import peft_folder
from olora_ray.common import node_cache, storage
from olora_ray.common.errors import TryAgain, UserError, as_user_error, short_reason
from olora_ray.config.load import with_model
from olora_ray.config.schema import AnyConfig
from olora_ray.data.tokenizer_spec import TokenizerSpec, spec_from_pretrained
from olora_ray.model import stored
from olora_ray.model.load import end_tokens, load_tokenizer, skeleton
from olora_ray.model.packing import why_apart
from olora_ray.model.source import BaseModel, obtain
from olora_ray.pipeline import model_files
from olora_ray.pipeline.merge import write_merged
from olora_ray.tracking import models
from olora_ray.tracking.models import BaseOfAdapter, Registered

logger = logging.getLogger(__name__)

# From `model.name` to a model folder on this machine. An adapter-only version consists of a base model and an adapter.


def find_model(config: AnyConfig, entry: Registered | None = None) -> BaseModel:
    """Return the base model of a config; download it, fetch it from the registry or convert it if necessary.

    `entry` is the version of a models:/ name if the caller has looked it up, so that its files are checked only once.
    Raises UserError if the model is missing, if the folder is no model, or if a converted model cannot be written.
    """
    with as_user_error(
        f"model.name: {config.model.name} cannot be opened", OSError, reason=_path_and_reason
    ):
        entry = entry or models.of_config(config)
        if entry is None:
            return obtain(config, None)
        if entry.base is None:
            return obtain(config, entry.folder)
        return obtain(config, _merged(entry, entry.base, config))


def parts(
    entry: Registered, base: BaseOfAdapter, config: AnyConfig
) -> tuple[AnyConfig, BaseModel, str]:
    """Return (config with the base model's name, base model, adapter folder or URI that all nodes can read).

    Raises UserError if the base model of the adapter-only version is missing or has changed.
    """
    own, model = _base(entry, base, config)
    if not storage.is_uri(config.run.storage):
        return own, model, str(entry.folder)
    key = storage.digest_file(entry.folder / peft_folder.WEIGHTS)[:16]
    path = storage.join(
        config.run.storage, "adapters", f"{entry.version.name}-{entry.version.number}-{key}"
    )
    node_cache.upload(entry.folder, path, last=peft_folder.CONFIG)
    return own, model, path


def _base(entry: Registered, base: BaseOfAdapter, config: AnyConfig) -> tuple[AnyConfig, BaseModel]:
    # First the folder of the base model at the time of registration, then the place to which its name leads now.
    at_registration = with_model(config, base.folder)
    own = with_model(config, base.name, base.revision)
    for candidate in (at_registration, own):
        passes = False
        try:
            model = find_model(candidate)
        except UserError as error:
            passes = isinstance(error, TryAgain)
            why = f"cannot be opened ({str(error).removeprefix('model.name: ')})"
            continue
        if base.digest == model.digest:
            return own, replace(model, name=base.name)
        why = f"has changed since that training, in {model.folder}"
    problem = f"{entry.version.name} version {entry.version.number} is an adapter of {base.name}, which {why}"
    if passes:
        raise TryAgain(problem)
    raise UserError(f"{problem}; restore the files in {base.folder}")


def _merged(entry: Registered, base: BaseOfAdapter, config: AnyConfig) -> Path:
    own, model = _base(entry, base, config)
    content = [
        storage.digest_file(entry.folder / name)
        for name in (peft_folder.CONFIG, peft_folder.WEIGHTS)
    ]
    key = storage.digest(model.digest, *content, length=16)
    target = models.cache_folder(config) / f"merged-{key}"
    if not target.is_dir():
        logger.info(
            f"model.name: merging {entry.version.name} version {entry.version.number} into its base model"
        )
        with storage.staged(target) as folder:
            shape = skeleton(model, own.model)
            adapter, scale = peft_folder.read_adapter(entry.folder, shape)
            write_merged(Path(model.folder), adapter, scale, folder, shape)
            model_files.copy_tokenizer(entry.folder, folder)
    return target


def _path_and_reason(error: BaseException) -> str:
    path = getattr(error, "filename", None)
    reason = short_reason(error)
    return f"{path}: {reason}" if path else reason


TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)
"""File names of tokenizers; every tokenizer has at least one of them."""


@dataclass(frozen=True)
class Base:
    model: BaseModel
    tokenizer: Any
    """The Hugging Face tokenizer."""
    spec: TokenizerSpec
    """The serialisable part of the tokenizer, for other processes."""
    eos: tuple[int, ...]
    """Ids of the tokens that end an answer."""


def open_base(config: AnyConfig) -> Base:
    """Return the base model and its tokenizer; raise UserError as `find_model`, or for an unusable tokenizer."""
    logger.info(f"opening the base model {config.model.name}")
    return with_tokenizer(find_model(config), config)


def with_tokenizer(model: BaseModel, config: AnyConfig) -> Base:
    """Return a base model with its tokenizer; raise UserError if either cannot be used."""
    if not any((Path(model.folder) / name).is_file() for name in TOKENIZERS):
        raise UserError(
            f"model.name: {model.folder} has no tokenizer: {', '.join(TOKENIZERS)} are all missing; copy the model's"
            " tokenizer files into the folder"
        )
    tokenizer = load_tokenizer(model, config.model)
    shape: Any = skeleton(model, config.model)
    fit = stored.fit(Path(model.folder), shape)
    # transformers only warns of missing or misshapen weights, and would train a model with random ones.
    if fit.problem is not None:
        raise UserError(f"model.name: {model.folder} {fit.problem}")
    if fit.left_out:
        logger.warning(fit.warning(shape, model.name))
    if getattr(shape.config.get_text_config(), "prefix_lm", False):
        logger.warning(
            f"model.name: {model.name} is a prefix language model (prefix_lm in its config), but it is trained as a"
            " causal model: each token attends only to earlier tokens"
        )
    try:
        rows: int | None = int(shape.get_input_embeddings().weight.shape[0])
    except (NotImplementedError, AttributeError):
        rows = None  # the model's code does not expose its embeddings
    spec = spec_from_pretrained(tokenizer, model.name, config.data.chat_template or "", rows)
    spec = replace(spec, apart=why_apart(shape), ends=end_tokens(model, tokenizer))
    return Base(model, tokenizer, spec, _ends(model, tokenizer, spec))


def _ends(model: BaseModel, tokenizer: Any, spec: TokenizerSpec) -> tuple[int, ...]:
    # Training teaches the model to end an answer with the last token of the template, so generation stops there too.
    last = spec.turn_end()
    if last is None or last in spec.ends:
        return spec.ends
    token = tokenizer.convert_ids_to_tokens(last)
    logger.warning(
        f"{spec.setting} ends an answer with {token!r}, which is no end token in the tokenizer or"
        f" generation_config.json; configure it as a stop token in your server (id {last})"
    )
    return tuple(sorted((*spec.ends, last)))
