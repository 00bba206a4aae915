"""Format text: plain text, all of it supervised."""

from olora_ray.data.formats.format import Example, Field, Format, Rejected, Row, Text


def read(row: Row) -> Example:
    text = row.text("text")
    if not text.strip():
        raise Rejected("empty_text", f"field {row.column('text')!r} is empty")
    return Text(text)


FORMAT = Format(
    "text",
    read,
    makes="text",
    fields=(Field("text", ("content", "document", "body", "article", "passage"), needed=True),),
    rules=2,
)
