"""docs/configuration.md is what the schema says."""

import re

from olora_ray.config.schema import Config, Data, Section
from tools import write_configuration


def names(section: type[Section]) -> set[str]:
    return {field.alias or name for name, field in section.model_fields.items()}


def test_the_page_is_current() -> None:
    current = write_configuration.PAGE.read_text(encoding="utf-8") == write_configuration.page()
    assert current, "docs/configuration.md is stale: make docs"


def test_every_field_of_every_section_has_a_row_with_a_description() -> None:
    parts = re.split(r"^## `(\w+)`$", write_configuration.page(), flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert list(sections) == list(Config.model_fields)
    for name, field in Config.model_fields.items():
        section = next(write_configuration._parts(field.annotation))
        rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \| (.*) \|$", sections[name], re.MULTILINE)
        inner = set.union(set(), *map(names, write_configuration._inside(section)))
        assert {row[0] for row in rows} == names(section) | inner
        assert all(kind and default and len(description) > 10 for _, kind, default, description in rows)


def test_links_lead_to_headings_of_the_page() -> None:
    text = write_configuration.page()
    headings = {write_configuration._anchor(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    links = set(re.findall(r"\]\(#([^)]+)\)", text))
    assert links == {"fields-of-a-source", "fields-of-a-condition"}
    assert links <= headings


def test_the_introductions_words_set_fields_that_there_are() -> None:
    words = re.findall(r" (\w+)\.(\w+)(?:\.\d+\.(\w+))?=", write_configuration.INTRO)
    assert len(words) >= 6
    for name, field, entry in words:
        section = next(write_configuration._parts(Config.model_fields[name].annotation))
        assert field in names(section)
        assert not entry or entry in names(next(write_configuration._inside(Data)))


def test_a_bar_in_a_description_does_not_end_its_cell() -> None:
    class Choice(Section):
        kind: str = "a"
        """ddp | fsdp."""

    assert write_configuration._table(Choice).splitlines()[-1] == r"| `kind` | text | `a` | ddp \| fsdp. |"
