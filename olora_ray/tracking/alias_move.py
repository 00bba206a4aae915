"""A move of a registered model's aliases, as it is announced in MLflow before it is made."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

LONGEST = 5000
"""Characters of a registered model's tag: MLflow's column, which PostgreSQL and MySQL enforce."""


@dataclass(frozen=True)
class Move:
    """All that one move of the aliases writes."""

    champion: str
    """Version that becomes the champion."""
    previous: str | None
    """Version that becomes `previous`; None: there is none any more."""
    tags: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Version -> tags it gets: its verdict. What that stands on is too long to be announced."""
    was: Mapping[str, str] | None = None
    """The champion and `previous` before; None: not known, the move was announced by an older release."""

    def to_json(self) -> str:
        """The MOVING tag, with the tags' texts cut as far as it takes to be no longer than a tag can be."""
        size = LONGEST
        while True:
            texts = {number: {key: text[:size] for key, text in each.items()} for number, each in self.tags.items()}
            found = json.dumps(asdict(replace(self, tags=texts)))
            if len(found) <= LONGEST or not size:
                return found
            size //= 2

    @classmethod
    def from_json(cls, text: str) -> "Move":
        """Read a MOVING tag; raises ValueError for anything else."""
        tree = json.loads(text)
        if not isinstance(tree, dict):
            raise ValueError("not a move")
        tags, was, previous = tree.get("tags"), tree.get("was"), tree.get("previous")
        if not isinstance(tags, dict) or not all(isinstance(each, dict) for each in tags.values()):
            raise ValueError("not a move")
        if not isinstance(was, dict | None) or not isinstance(tree.get("champion"), str):
            raise ValueError("not a move")
        texts = {str(number): {str(key): str(text) for key, text in each.items()} for number, each in tags.items()}
        return cls(tree["champion"], None if previous is None else str(previous), texts, was)
