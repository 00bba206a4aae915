"""A page in one file: the style of the reports of runs, searches and comparisons."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from string import Template

# The Content-Security-Policy makes the browser refuse anything that is not in the page itself.
_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1f2933; --muted: #5f6c7b; --line: #e1e5ea; --page: #f4f6f8; --card: #fff;
  --best: #d55e00; --soft: #fdf0e6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ed; --muted: #9aa7b5; --line: #333d48; --page: #14191f;
  --card: #1d242c; --best: #f28a3c; --soft: #3a2a1d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1320px; padding: 28px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
.about, .label, .reason, dt, footer { color: var(--muted); }
.cards, .figures { display: grid; gap: 14px; grid-template-columns: 1fr 1fr; }
.card, figure, .scroll { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px; }
.card.best { border-left: 5px solid var(--best); }
.value { font-size: 38px; font-weight: 700; color: var(--best); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 5px 16px; } dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 0; background: #fff; } figure.wide { grid-column: 1 / -1; } img { width: 100%; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { padding: 6px 10px; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
tr.best { background: var(--soft); font-weight: 600; }
.number { text-align: right; } td:last-child:not(.number) { white-space: normal; min-width: 260px; }
td.text, td.text:last-child, pre { white-space: pre-wrap; overflow-wrap: anywhere; vertical-align: top; min-width: 0; }
@media (max-width: 900px) { .cards, .figures { grid-template-columns: 1fr; } }
</style>
</head>
<body>
$body
</body>
</html>
""")


def document(title: str, body: str) -> str:
    return _PAGE.substitute(title=escape(title), body=body)


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
