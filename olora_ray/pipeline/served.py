"""What an exported folder needs so that others ask and answer as the training did: template, tokenizer, end tokens."""

import contextlib
import logging
from pathlib import Path
from typing import Any

from olora_ray.adapter import portable
from olora_ray.cluster.spec import TrainSpec
from olora_ray.config.schema import Config
from olora_ray.data import chat_template
from olora_ray.data.tokenizer_spec import adds_begin_token
from olora_ray.model.load import end_tokens, load_tokenizer, tokenizer_in
from olora_ray.model.source import BaseModel
from olora_ray.tracking import models

logger = logging.getLogger(__name__)


def give_template(config: Config, base: BaseModel, folder: Path) -> None:
    """A base without a chat template was trained with the default one: its users need it too."""
    if _of_chats(config) and not models.has_chat_template(folder):
        template = chat_template.default(adds_begin_token(load_tokenizer(base, config.model)))
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        (folder / "chat_template.json").unlink(missing_ok=True)  # a processor's, which was not trained with


def _of_chats(config: Config) -> bool:
    """Whether some of the training data are chats."""
    return any(
        source.format not in ("text", "prompt_completion") or source.chat is True for source in config.data.train
    )


def more_ends(spec: TrainSpec, base: BaseModel) -> str:
    """The tokens that end an answer here and not by the base's own files, with their ids; usually none."""
    tokenizer = load_tokenizer(base, spec.config.model)
    more = sorted(set(spec.eos) - set(end_tokens(base, tokenizer)))
    return ", ".join(f"`{tokenizer.convert_ids_to_tokens(token)}` ({token})" for token in more)


def keep_tokenizer(config: Config, base: BaseModel, folder: Path) -> None:
    """Have the tokenizer of an adapter's folder be the base's.

    By the model's type in config.json, which an adapter has not, transformers may take another class than the one that
    tokenizer_config.json names, and some classes cut text in their own way whatever tokenizer.json says.
    """
    own, settings = load_tokenizer(base, config.model), folder / "tokenizer_config.json"
    before = settings.read_bytes() if settings.is_file() else None
    wanted = _as_text(own)
    for name in ("", "PreTrainedTokenizerFast", type(own).__name__):
        if name:
            portable.name_class(folder, name)
        with contextlib.suppress(Exception):  # of whatever a class has against the files
            if _as_text(tokenizer_in(folder, config.model.trust_remote_code)) == wanted:
                return
    if before is not None:
        settings.write_bytes(before)
    logger.warning(
        f"export: the tokenizer in the adapter's folder does not cut text as that of {base.name} does: load the base's"
    )


def _as_text(tokenizer: Any) -> str:
    """What it makes of text, as tokenizer.json has it."""
    return str(tokenizer.backend_tokenizer.to_str())
