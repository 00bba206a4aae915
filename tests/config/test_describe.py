"""The schema in words, for --help and for docs/generated/configuration.md."""

import re
from typing import Any

import pytest

from olora_ray.config.command_line import WIDTH, help_text
from olora_ray.config.nights import Condition
from olora_ray.config.schema import Config
from olora_ray.config.section import Source
from olora_ray.config.tables import FORMATS
from olora_ray.data.formats import own_formats


def test_help_has_every_field_of_every_section() -> None:
    words = {line.split()[0].rstrip(":") for line in help_text().splitlines()}
    sections = [field.annotation for field in Config.model_fields.values()]
    assert {
        *Config.model_fields,
        *(name for each in (*sections, Source, Condition) for name in _names(each)),
    } <= words


def _names(section: Any) -> list[str]:
    return [field.alias or name for name, field in section.model_fields.items()]


@pytest.mark.parametrize(
    ("field", "shown"),
    [
        ("format", f"({', '.join(('auto', *FORMATS.names()))}) [auto]"),
        ("schedule", "(cosine, linear, constant) [cosine]"),
        ("dtype", "(auto, float32, bfloat16) [auto]"),
        ("revision", "(text or null) [null]"),
        ("eval", "(list of source) [[]]"),
        ("train", "(list of source, 1 or more) [required]"),
        ("rank", "(whole number (≥ 1)) [16]"),
    ],
)
def test_help_has_the_choices_and_the_default_as_yaml(field: str, shown: str) -> None:
    entries = re.split(r"\n(?= *\w+ {2,}\S|\w+:)", help_text())
    texts = [" ".join(entry.split()) for entry in entries]
    assert any(text.startswith(f"{field} ") and text.endswith(shown) for text in texts), texts


def test_help_shows_nothing_of_python_and_fits_a_terminal() -> None:
    text = help_text()
    assert not re.search(r"\bNone\b|\(\)|\bTrue\b|\bFalse\b", text)
    assert max(map(len, text.splitlines())) <= WIDTH


def test_help_and_the_editors_schema_name_the_fields_of_each_format() -> None:
    schema = Source.model_json_schema()["properties"]["format"]["description"]
    for text in (help_text(), schema):
        text = " ".join(text.split())
        for format in own_formats():
            assert f"{format.name} {{{', '.join(format.names)}}}" in text
