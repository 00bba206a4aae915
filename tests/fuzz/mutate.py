"""Mutations of texts, bytes and trees, all from a seeded generator."""

import copy
import json
import struct
from random import Random
from typing import Any

ODD_TEXTS = [
    "",
    " ",
    "\0",
    "\ufeff",
    "\ud800",
    "\u2028",
    "é" * 9,
    "𝄞",
    "a\nb",
    "../../x",
    "/etc/passwd",
    "~",
    "%00",
    "x" * 5000,
]
ODD_NUMBERS = [
    0,
    -1,
    1,
    2**31,
    2**32,
    2**53 + 1,
    2**63,
    2**64,
    10**30,
    -(2**63),
    0.5,
    1e308,
    float("inf"),
    float("nan"),
]
ODD_VALUES: list[Any] = [
    None,
    True,
    False,
    [],
    {},
    [[]],
    {"": 0},
    [None],
    {"a": {"a": {}}},
    *ODD_TEXTS,
    *ODD_NUMBERS,
]


def deep(levels: int, kind: str) -> Any:
    """A list or mapping of so many levels."""
    value: Any = 0
    for _ in range(levels):
        value = [value] if kind == "list" else {"a": value}
    return value


def value(random: Random) -> Any:
    """Anything that JSON can say."""
    if random.random() < 0.05:
        return deep(random.choice([5, 60, 400]), random.choice(["list", "mapping"]))
    return copy.deepcopy(random.choice(ODD_VALUES))


def places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a tree."""
    found, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        items = (
            list(node.items())
            if isinstance(node, dict)
            else list(enumerate(node))
            if isinstance(node, list)
            else []
        )
        for key, inner in items:
            found.append((node, key))
            waiting.append(inner)
    return found


def tree(random: Random, original: Any, times: int | None = None) -> Any:
    """A copy with some values changed, dropped, moved or added."""
    changed = copy.deepcopy(original)
    for _ in range(times if times is not None else random.choice([1, 1, 1, 2, 4])):
        there = places(changed)
        if not there:
            return value(random)
        node, key = random.choice(there)
        match random.randrange(8):
            case 0:
                del node[key]
            case 1 if isinstance(node, dict):
                node[str(value(random))[:2000]] = node.pop(key)
            case 2:
                node[key] = copy.deepcopy(random.choice(there)[0])
            case 3 if isinstance(node, list):
                node.insert(key, value(random))
            case 4 if isinstance(node[key], int | float) and not isinstance(node[key], bool):
                node[key] = node[key] * random.choice([-1, 2, 1000, 10**9, 0.5]) + random.choice(
                    [0, 1]
                )
            case 5 if isinstance(node[key], str):
                node[key] = text(random, node[key])
            case _:
                node[key] = value(random)
    return changed


def text(random: Random, original: str) -> str:
    """A text with some characters cut, repeated or replaced."""
    letters = list(original)
    for _ in range(random.choice([1, 1, 2, 5])):
        start = random.randrange(len(letters) + 1)
        stop = min(len(letters), start + random.choice([1, 1, 3, 20]))
        match random.randrange(4):
            case 0:
                del letters[start:stop]
            case 1:
                letters[start:start] = random.choice(ODD_TEXTS)[:100]
            case 2:
                letters[start:start] = letters[start:stop] * random.choice([1, 2, 50])
            case _:
                letters[start:stop] = random.choice("{}[]\"':,&*!|>%@`#-?\\\t\n\r=<0")
    return "".join(letters)


def raw(random: Random, original: bytes, front: int | None = None) -> bytes:
    """Bytes with flipped bits, cut, repeated or overwritten; within the first `front` bytes if it is given."""
    content = bytearray(original)
    for _ in range(random.choice([1, 1, 2, 8])):
        limit = min(len(content), front or len(content))
        place = random.randrange(limit + 1)
        match random.randrange(6):
            case 0 if limit:
                content[min(place, limit - 1)] ^= 1 << random.randrange(8)
            case 1:
                del content[place:]
            case 2:
                content[place : place + 8] = struct.pack(
                    "<Q", random.choice([0, 1, 2**31, 2**32, 2**40, 2**63, 2**64 - 1])
                )
            case 3:
                content[place : place + 4] = random.randbytes(4)
            case 4:
                content[place:place] = content[place : place + random.choice([1, 10, 300])]
            case _:
                del content[place : place + random.choice([1, 2, 17])]
    return bytes(content)


def as_json(tree: Any, random: Random | None = None) -> str:
    """JSON, sometimes with a key twice."""
    written = json.dumps(tree)
    if random is not None and isinstance(tree, dict) and tree and random.random() < 0.05:
        key = random.choice(list(tree))
        return f"{written[:-1]}, {json.dumps(key)}: {json.dumps(value(random))}}}"
    return written
