"""A page in one file: the style of the pages of runs, searches and comparisons (pages/*.html)."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import jinja2


def rendered(name: str, **values: Any) -> str:
    """Return the page of a template in pages/; `title` and `verdict` (plain text) are those of base.html."""
    loader = jinja2.PackageLoader("olora_ray.common", "pages")
    pages = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return pages.get_template(name).render(values)


def document(title: str, body: str, verdict: str) -> str:
    """Return a page of HTML `body` below its verdict."""
    return rendered("base.html", title=title, body=body, verdict=verdict)


def image(png: bytes, described: str, wide: bool) -> str:
    data = base64.b64encode(png).decode()
    kind = ' class="wide"' if wide else ""
    return (
        f'<figure{kind}><img alt="{escape(described)}" src="data:image/png;base64,{data}"></figure>'
    )


def terms(pairs: Iterable[tuple[str, str]]) -> str:
    lines = [f"<dt>{escape(name)}</dt><dd>{escape(said)}</dd>" for name, said in pairs]
    return f"<dl>{''.join(lines)}</dl>"


Head = tuple[str, str, str]
"""A column's name, its class (`number`, `text` or none), and what the mouse shows over its name."""


def table(heads: Sequence[Head], rows: Iterable[Sequence[str]], best: int | None = None) -> str:
    """Return a table; the row of number `best`, from 0, is marked."""
    named = [
        f'<th scope="col" class="{kind}" title="{escape(full)}">{escape(name)}</th>'
        for name, kind, full in heads
    ]
    body = []
    for number, row in enumerate(rows):
        cells = [
            f'<td class="{kind}">{escape(shown)}</td>'
            for shown, (_, kind, _) in zip(row, heads, strict=True)
        ]
        body.append(f'<tr class="{"best" if number == best else ""}">{"".join(cells)}</tr>')
    lines = "\n".join(body)
    return (
        f'<div class="scroll"><table><thead><tr>{"".join(named)}</tr></thead>\n'
        f"<tbody>\n{lines}\n</tbody></table></div>"
    )
