"""Input example of a registered model: the first held-out question of its training, as a request to a server."""

import re
from pathlib import Path
from typing import Any

from olora_ray.cluster.spec import TrainSpec
from olora_ray.model.load import load_tokenizer
from olora_ray.model.source import BaseModel
from olora_ray.pipeline.answers import as_text
from olora_ray.tracking.mlmodel import has_chat_template

LONGEST = 4000
"""Characters of a question that still serves as an example."""
_ROLES = (("user",), ("system", "user"))
_MARK = "\N{OBJECT REPLACEMENT CHARACTER}%d\N{OBJECT REPLACEMENT CHARACTER}"


def request(spec: TrainSpec, folder: Path, prompt: tuple[int, ...]) -> dict[str, Any] | None:
    """The request that asks the model in `folder` what `prompt` (token ids) asks; None if there is no such request."""
    tokenizer = load_tokenizer(BaseModel(str(folder), str(folder), ""), spec.config.model)
    limit = {"max_tokens": spec.config.evaluation.max_new_tokens}
    if not has_chat_template(folder):
        text = as_text(tokenizer, prompt)
        return {"prompt": text, **limit} if 0 < len(text) <= LONGEST else None
    messages = chat(tokenizer, as_text(tokenizer, prompt, special=True))
    return {"messages": messages, **limit} if messages else None


def chat(tokenizer: Any, text: str) -> list[dict[str, str]] | None:
    """The messages that the tokenizer's chat template writes as `text`; None if these are not one or two."""
    for roles in _ROLES:
        marked = _rendered(tokenizer, [{"role": role, "content": _MARK % i} for i, role in enumerate(roles)])
        pattern = re.escape(marked)
        for i in range(len(roles)):
            pattern = pattern.replace(re.escape(_MARK % i), "(.+?)", 1)
        found = re.fullmatch(pattern, text, re.DOTALL)
        if found is None or len(found.groups()) != len(roles) or len(text) > LONGEST:
            continue
        messages = [{"role": role, "content": content} for role, content in zip(roles, found.groups(), strict=True)]
        if _rendered(tokenizer, messages) == text:
            return messages
    return None


def _rendered(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """The text of a conversation before its answer; empty if the template refuses it."""
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)).strip()
    except Exception:  # a template is code: it may raise anything
        return ""
