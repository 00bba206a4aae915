"""YAML as configs are written: numbers such as 1e-4 are read, and texts that look like them are quoted.

Keys are texts, whatever they look like (`on:` is no boolean). A key that comes twice is refused, and so is what no
config needs: tags of other types, great depth, and aliases that unfold to millions of values.
"""

import re
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from olora_ray.common.errors import UserError

_STANDARD = "tag:yaml.org,2002:"
_TEXT, _MERGE = f"{_STANDARD}str", f"{_STANDARD}merge"
_KINDS = {
    "str": "text",
    "int": "whole number",
    "float": "number",
    "bool": "boolean",
    "null": "null",
    "timestamp": "date or time",
    "seq": "list",
    "map": "mapping",
}
_DEEPEST = 50
_MOST_NODES = 50_000
"""Values, lists and mappings, aliases unfolded: a few seconds. A source's 10,000 files are as many nodes."""
_MOST_CHARACTERS = 2_000_000
_LONGEST_NUMBER = 64
_LARGEST_INTEGER = 2**63 - 1
_OCTAL = re.compile("[-+]?0[0-7_]+")
_HALF = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class Loader(yaml.SafeLoader):
    """SafeLoader that also reads 1e-4 as a number (YAML 1.1 wants 1.0e-4), and has bounds.

    All it refuses is a MarkedYAMLError with the line.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth, self._nodes = 0, 0
        self._sizes: dict[yaml.Node, int] = {}
        """Nodes of those that are read whole, aliases unfolded."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node; raises ComposerError beyond the bounds."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        before = self._nodes
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if node not in self._sizes:
                raise _problem(event.start_mark, f"*{event.anchor} stands inside of what it names")
            self._nodes += self._sizes[node]
        else:
            if self._depth == _DEEPEST:
                raise _problem(event.start_mark, f"more than {_DEEPEST} levels of lists and mappings")
            self._nodes, self._depth = before + 1, self._depth + 1
            node = super().compose_node(parent, index)
            self._depth -= 1
            if node is not None:
                self._sizes[node] = self._nodes - before
        if self._nodes > _MOST_NODES:
            raise _problem(event.start_mark, f"more than {_MOST_NODES:,} values, aliases unfolded")
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """The next mapping, its keys as texts; raises ComposerError for a key that is none, or comes twice."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        pairs = []
        for key, value in node.value:
            if key.tag != _MERGE:
                key = _text_key(key)
                if key.value in lines:
                    raise _problem(
                        key.start_mark, f"the key {_shown(key.value)} stands in line {lines[key.value]} already"
                    )
                lines[key.value] = key.start_mark.line + 1
            pairs.append((key, value))
        node.value = pairs
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node; raises ConstructorError where it has none."""
        kind = _KINDS.get(node.tag.removeprefix(_STANDARD))
        if kind is None:
            raise _problem(node.start_mark, f"the tag or value {_shown(node.tag.removeprefix(_STANDARD))} is not known")
        if kind not in ("text", "list", "mapping") and len(node.value) > _LONGEST_NUMBER:
            raise _problem(node.start_mark, f"{_shown(node.value)} is too long for a {kind}; quote it if it is a text")
        try:
            value = super().construct_object(node, deep)
        except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError):
            raise _problem(node.start_mark, f"{_shown(node.value)} is no {kind}; quote it if it is a text") from None
        if kind == "whole number" and _OCTAL.fullmatch(node.value) and value != int(node.value.replace("_", "")):
            raise _problem(
                node.start_mark,
                f"{_shown(node.value)} would be {value}: with a 0 in front YAML counts in eights; write it without, or"
                " quote it if it is a text",
            )
        if isinstance(value, int) and abs(value) > _LARGEST_INTEGER:
            raise _problem(node.start_mark, f"{_shown(node.value)} is too large for a {kind}")
        if isinstance(value, str) and (_CONTROL.search(value) or not _is_unicode(value)):
            raise _problem(node.start_mark, f"{_shown(value)} has a character that is no text in it")
        return value


class Dumper(yaml.SafeDumper):
    """SafeDumper that quotes a text which `Loader` would read as a number."""


for _kind in (Loader, Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:\d[\d_]*)(?:\.\d*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )


def parse_yaml(text: str, where: str) -> Any:
    """Read YAML; `where` names the text in the UserError, with the line, that broken YAML raises."""
    if len(text) > _MOST_CHARACTERS:
        raise UserError(f"{where}: {len(text):,} characters, more than {_MOST_CHARACTERS:,}: not a config")
    try:
        return yaml.load(text, Loader=Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = " ".join((error.problem or "").removeprefix("but ").split())
        raise UserError(f"{where}{line}: not valid YAML: {problem[:200]}") from None
    except yaml.reader.ReaderError as error:
        line = f", line {text.count(chr(10), 0, error.position) + 1}"
        raise UserError(
            f"{where}{line}: not valid YAML: the character #x{error.character:04x} is not allowed"
        ) from None


def _text_key(key: yaml.Node) -> yaml.ScalarNode:
    """The key as it is written."""
    if not isinstance(key, yaml.ScalarNode):
        raise _problem(key.start_mark, "a list or mapping cannot be a key")
    if not key.value:
        raise _problem(key.start_mark, "an empty key")
    # A copy: the node may be the value of another key, through an alias.
    return yaml.ScalarNode(_TEXT, key.value, key.start_mark, key.end_mark)


def _problem(mark: Any, text: str) -> ConstructorError:
    return ConstructorError(None, None, text, mark)


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else "this"
    return ascii(text if len(text) <= 40 else f"{text[:37]}...")


def _is_unicode(text: str) -> bool:
    """Whether it has no half of a surrogate pair in it, which no file can hold."""
    return text.isascii() or not _HALF.search(text)
