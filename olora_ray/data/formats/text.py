"""Format text: plain text, all of it supervised."""

from olora_ray.data.formats.format import Example, Field, Format, Rejected, Row, Text


def read(row: Row) -> Example:
    text = ""
    if row.columns.get(row.column("text"), "") is not None:
        text = row.text("text")
    if not text.strip():
        raise Rejected("empty_text", f"field {row.column('text')!r} is empty")
    return Text(text)


TEXT = Field(
    "text",
    ("content", "document", "body", "article", "passage", "code", "sentence"),
    needed=True,
)
FORMAT = Format("text", read, makes="text", fields=(TEXT,), rules=2)
