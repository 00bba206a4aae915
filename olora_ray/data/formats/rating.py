"""Format rating: an answer with a thumb up or down, as KTO trainers read it."""

from dataclasses import replace

from olora_ray.data.formats import messages, prompt_completion
from olora_ray.data.formats.chat import SYSTEM
from olora_ray.data.formats.format import (
    Chat,
    Completion,
    Example,
    Field,
    Format,
    Rated,
    Rejected,
    Row,
)
from olora_ray.data.formats.preference import with_role

THUMBS = {
    "true": True,
    "1": True,
    "1.0": True,
    "up": True,
    "false": False,
    "-1": False,
    "-1.0": False,
    "down": False,
}


def read(row: Row) -> Example:
    value = row.value("label")
    up = THUMBS.get(str(value).strip().lower())
    if up is None:
        raise Rejected(
            "no_rating", f"field {row.column('label')!r} is {value!r}, not true or false"
        )
    turns = row.optional("messages")
    if isinstance(turns, list):
        turns = [with_role(turn) for turn in turns]
        answer: Example = messages.read(
            row._replace(columns={**row.columns, row.column("messages"): turns})
        )
    elif turns is not None:
        answer = messages.read(row)
    else:
        answer = prompt_completion.read(row)
    assert isinstance(answer, Chat | Completion)
    return Rated(answer, up)


OF_ANSWERS = [replace(field, needed=False) for field in prompt_completion.FORMAT.fields]
FORMAT = Format(
    "rating",
    read,
    makes="rating",
    fields=(
        Field("label", ("kto_tag", "rating", "thumb", "feedback"), needed=True),
        *OF_ANSWERS,
        Field("messages", ("conversation", "conversations")),
        replace(SYSTEM, asked=True),
    ),
    tools=True,
)
