"""Messages for settings that cannot be: each names its field and says what to do."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic_core import ErrorDetails

from olora_ray.common import secrets
from olora_ray.config import words
from olora_ray.config.dotted import leaves
from olora_ray.config.evaluation import EvaluationConfig
from olora_ray.config.field_types import EXPERIMENT, MODEL_NAME, NAME, WEBHOOK
from olora_ray.config.schema import Config, Section

_UNION_TAG = re.compile(r"[\[\](){}]|^(tuple|literal|float|str|int|constrained-\w+)\b")
PHRASES = {
    "tuple_type": "expected a list, [...]",
    "dict_type": "expected a mapping, {name: value}",
    "too_short": "at least 1 item is needed",
    "model_type": "expected a mapping of fields, {name: value}",
    "model_attributes_type": "expected a mapping of fields, {name: value}",
}
"""pydantic's kinds of problems -> words for those who write YAML."""
PATTERNS = {
    NAME: "a name has letters, digits, '.', '_' and '-' only, begins with a letter or digit and does not end with '.'",
    MODEL_NAME: "a name has letters, digits, ' ', '.', '_' and '-' only, and begins and ends with a letter or digit",
    EXPERIMENT: "a name of printable characters is expected",
    WEBHOOK: "an address is expected: http://... or https://..., or env:NAME or file:/PATH that holds one",
}
"""The patterns of texts in words."""

_ITEMS = 8
"""Items of a list that are shown."""


def explain(item: ErrorDetails, root: type[Section]) -> str:
    """One of pydantic's problems as `field: what is wrong`, with what the user may have meant; no secret is in it."""
    return _short(_explain(item, root), 500)


def _explain(item: ErrorDetails, root: type[Section]) -> str:
    # pydantic puts the tags of unions into the location: only names and indices are the user's.
    *outer, last = [str(part) for part in item["loc"]] or [""]
    parts = [part for part in outer if not _UNION_TAG.search(part)]
    unknown = item["type"] == "extra_forbidden"
    if unknown or (last and not _UNION_TAG.search(last)):
        parts.append(last)
    field = _short(".".join(parts), 200)
    if unknown:
        return f"{field}: unknown field; {_instead_of(parts, root)}"
    if item["type"] == "missing":
        return f"{field}: required, but not set"
    message = PHRASES.get(item["type"]) or item["msg"].removeprefix("Value error, ")
    if item["type"] == "string_pattern_mismatch":
        message = PATTERNS.get(item.get("ctx", {}).get("pattern", ""), message)
    message = message[0].lower() + message[1:]
    shown = "" if item["type"] == "value_error" else f" (got {_shown(item['input'])})"
    return f"{field}: {message}{shown}" if field else message


def relevant(items: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """The problems without those that only follow from another: a list with a broken entry also counts as too short."""
    return [
        item
        for item in items
        if not (item["type"] == "too_short" and item["input"])
        or not any(other is not item and other["loc"][: len(item["loc"])] == item["loc"] for other in items)
    ]


def _instead_of(parts: Sequence[str], root: type[Section]) -> str:
    """What to do instead of an unknown field: the word of another tool, a typo, or a look at the list."""
    if secrets.is_name(parts[-1]):
        return "a config holds no secrets, they come from the environment or a file"
    if issubclass(root, Config | EvaluationConfig) and (advice := words.advice(parts[-1], ".".join(parts))):
        return advice
    if near := difflib.get_close_matches(parts[-1], _names_beside(parts, root), n=1):
        return f"did you mean {'.'.join([*parts[:-1], near[0]])}?"
    return "--help lists the fields"


def _shown(value: Any) -> str:
    """A value in an error message; of a mapping no values, since its keys may be anything."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return f"[{', '.join([*map(_shown, value[:_ITEMS]), *['...'] * (len(value) > _ITEMS)])}]"
    return _short(repr(value), 80)


def _short(text: str, length: int) -> str:
    """One line without secrets, cut: they are masked first, because a part of one is not recognised."""
    line = " ".join(secrets.mask(text).splitlines())
    return line if len(line) <= length else f"{line[: length - 3]}..."


def texts(tree: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Dotted field and text of every text in a tree."""
    for field, value in leaves(tree, ""):
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, str):
                yield field, item


def instead(field: str, text: str) -> str:
    """The way to give the secret that stands in a field."""
    if field not in ("tracking.uri", "notify.url"):
        names = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN"
        return f"has a secret in its address; write it without, and set the service's variables ({names})"
    if field == "tracking.uri" and text.startswith("http"):
        return (
            "has a secret in its address; write it without, and set MLFLOW_TRACKING_USERNAME and"
            " MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    return (
        "has a secret in its address; put the address in a variable or a file of one line, and write env:NAME"
        " or file:/PATH"
    )


def _names_beside(parts: Sequence[str], root: type[Section]) -> list[str]:
    section = root
    for part in parts[:-1]:
        named = section.model_fields.items()
        field = next((field for name, field in named if part in (name, field.alias)), None)
        section = (_section_in(field.annotation) if field else None) or section
    return [field.alias or name for name, field in section.model_fields.items()]


def _section_in(annotation: Any) -> type[Section] | None:
    """The section that an annotation is, or has inside, as tuple[Source, ...] does."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section_in(inner))), None)
