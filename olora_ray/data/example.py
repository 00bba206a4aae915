"""What a format makes of a row: a chat, a prompt with its completion, or plain text; or the row is rejected."""

from dataclasses import dataclass
from typing import Any

LONGEST_MESSAGE = 400
"""Characters of a message about a rejected row."""


class Rejected(Exception):
    """A row that cannot be used."""

    def __init__(self, reason: str, message: str) -> None:
        """`reason` is a short slug to count by; `message` is for the person who looks at the row: one line."""
        # Names of columns and parts of the row are in it: line breaks and half surrogate pairs, too.
        line = " ".join(message.encode("utf-8", "backslashreplace").decode().split())
        self.reason = reason
        self.message = line if len(line) <= LONGEST_MESSAGE else line[:LONGEST_MESSAGE] + "..."
        super().__init__(f"{reason}: {self.message}")


@dataclass(frozen=True)
class Chat:
    """A conversation with at least one answer of the assistant."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None = None


@dataclass(frozen=True)
class Completion:
    """A prompt and what follows it, without any template."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """A document."""

    text: str


Example = Chat | Completion | Text
