"""The form in which a source's prompts and completions are trained: turns of a chat, or joined texts.

With `chat: auto` they are a chat where the model has a chat template, so that the form that is trained is the form that
is served. Also here: what of this has an influence on tokens, for the digest of a token store.
"""

from collections.abc import Collection
from typing import Any

from olora_ray.config.schema import Source
from olora_ray.data.tokenizer_spec import TokenizerSpec

RULES = {"text": 2, "prompt_completion": 3, "alpaca": 2, "sharegpt": 2}
"""Counts how often the tokens of a format's rows have changed; 1 for those that are not named."""
WITH_TOOLS = ("messages", "prompt_completion", "sharegpt")
"""Formats whose messages may have tool calls."""
COLUMNS_OF_STRUCTS = {"parquet", "arrow"}
"""Kinds of files in which an object has the keys of all rows."""


def as_chat(source: Source, spec: TokenizerSpec) -> bool:
    """Whether the prompts and completions of a source are turns of a chat."""
    if source.format != "prompt_completion":
        return False
    return spec.has_template if source.chat == "auto" else source.chat


def digest_inputs(source: Source, spec: TokenizerSpec, kinds: Collection[str]) -> dict[str, Any]:
    """What decides the tokens of a source beside its setting; `kinds` are those of its files.

    Empty where the same rows have always had the same tokens.
    """
    found: dict[str, Any] = {}
    if source.format in RULES:
        found["rules"] = RULES[source.format]
    elif COLUMNS_OF_STRUCTS.intersection(kinds):
        found["rules"] = 2
    if source.format in WITH_TOOLS and COLUMNS_OF_STRUCTS.intersection(kinds):
        found["maps"] = "objects"
    if source.format == "prompt_completion":
        found["chat"] = as_chat(source, spec)
    chats = source.format in WITH_TOOLS and found.get("chat", True)
    if chats and any(spec.parses_arguments(tools) for tools in (False, True)):
        found["arguments"] = "objects"
    if chats and any(spec.wants_null(tools) for tools in (False, True)):
        found["calls_alone"] = "null"
    return found


def form_line(source: Source, spec: TokenizerSpec, setting: str) -> str | None:
    """Which form the rows of a source have, in a line; None where their format leaves no choice."""
    if source.format != "prompt_completion":
        return None
    if as_chat(source, spec):
        template = "its chat template" if spec.has_template else "the plain chat template, since it has none"
        return f"{setting}: prompts and completions are turns of a chat; {spec.name} gets them through {template}"
    warning = f", but {spec.name} has one and is served with it" if spec.has_template else f": {spec.name} has none"
    return f"{setting}: prompts and completions are joined as they are, without a chat template{warning}"
