"""Style and script of the report's page, and the tags it is made of. All text that goes in is escaped."""

import base64
from collections.abc import Iterable
from html import escape

from olora_ray.sweep.report.style import BEST, FAILED, GOOD

STYLE = (
    """
:root { color-scheme: light dark; --ink: #1f2933; --muted: #5f6c7b; --line: #e1e5ea; --page: #f4f6f8; --card: #fff;
  --row: #f8fafb; --best: BEST; --soft: #fdf0e6; --good: GOOD; --failed: FAILED; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ed; --muted: #9aa7b5; --line: #333d48; --page: #14191f;
  --card: #1d242c; --row: #222a33; --best: #f28a3c; --soft: #3a2a1d;
  --good: #7fb9e0; --failed: #d98ac4; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1320px; padding: 28px 28px 48px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 26px; } h2 { margin: 32px 0 12px; font-size: 18px; }
.about { margin: 2px 0 20px; color: var(--muted); }
.cards { display: grid; gap: 14px; grid-template-columns: minmax(300px, 5fr) 7fr; }
.card, figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; }
.card.best { border-left: 5px solid var(--best); }
.value { font-size: 38px; font-weight: 700; line-height: 1.15; color: var(--best); font-variant-numeric: tabular-nums; }
.label { color: var(--muted); font-size: 13px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 5px 16px; margin: 0; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
.best dl { margin-top: 14px; } .best dd { font-weight: 600; font-variant-numeric: tabular-nums; }
.figures { display: grid; gap: 14px; grid-template-columns: 1fr 1fr; }
figure { margin: 0; padding: 8px; background: #fff; } figure.wide { grid-column: 1 / -1; }
img { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; } tbody tr:nth-child(even) { background: var(--row); }
tbody tr.best { background: var(--soft); font-weight: 600; }
th.number, td.number { text-align: right; } td.reason { white-space: normal; min-width: 260px; color: var(--muted); }
th button { all: unset; cursor: pointer; font-weight: 600; } th button:focus-visible { outline: 2px solid var(--best); }
th button::after { content: "\\2195"; padding-left: 4px; color: var(--muted); opacity: .6; }
th[aria-sort=ascending] button::after { content: "\\2191"; color: var(--best); opacity: 1; }
th[aria-sort=descending] button::after { content: "\\2193"; color: var(--best); opacity: 1; }
.tag { display: inline-block; padding: 0 8px; border: 1px solid var(--line); border-radius: 9px; font-size: 12.5px;
  font-weight: 400; }
.tag.failed { border-color: var(--failed); color: var(--failed); }
.tag.finished { border-color: var(--good); color: var(--good); }
footer { margin-top: 24px; color: var(--muted); font-size: 13px; }
@media (max-width: 900px) { .cards, .figures { grid-template-columns: 1fr; } body { padding: 16px; } }
@media print { body { max-width: none; } figure { break-inside: avoid; } }
""".replace("BEST", BEST)
    .replace("GOOD", GOOD)
    .replace("FAILED", FAILED)
)

SCRIPT = """
// A click on a column's name sorts by it, another turns the order around. Cells without a value stay last.
const table = document.querySelector("table");
const key = cell => cell.dataset.sort;
function compare(a, b) {
  if (a === b) return 0;
  if (a === "") return "last";
  if (b === "") return "first";
  const numbers = [Number(a), Number(b)];
  return numbers.some(Number.isNaN) ? a.localeCompare(b) : numbers[0] - numbers[1];
}
table.querySelectorAll("th").forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
  const down = head.getAttribute("aria-sort") === "ascending";
  table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const body = table.tBodies[0];
  const order = (left, right) => {
    const found = compare(key(left.cells[column]), key(right.cells[column]));
    return found === "last" ? 1 : found === "first" ? -1 : down ? -found : found;
  };
  [...body.rows].sort(order).forEach(row => body.append(row));
}));
"""

# The browser itself then refuses whatever would be fetched from elsewhere.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def document(title: str, body: str) -> str:
    """The whole page; `body` is HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def image(png: bytes, described: str, wide: bool) -> str:
    """A figure with the picture inside of the page."""
    data = base64.b64encode(png).decode()
    kind = ' class="wide"' if wide else ""
    return f'<figure{kind}><img alt="{escape(described)}" src="data:image/png;base64,{data}"></figure>'


def terms(pairs: Iterable[tuple[str, str]]) -> str:
    """A list of names and what is said of them."""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(said)}</dd>" for name, said in pairs) + "</dl>"


def cell(shown: str, sort: object = None, kind: str = "") -> str:
    """A cell of the table; `sort` is what it is sorted by, if not by the text."""
    by = shown if sort is None else str(sort)
    named = f' class="{kind}"' if kind else ""
    return f'<td{named} data-sort="{escape(by)}">{escape(shown)}</td>'


def tagged(word: str) -> str:
    """A cell with a word in a frame, coloured by what it says."""
    return f'<td data-sort="{escape(word)}"><span class="tag {escape(word)}">{escape(word)}</span></td>'


def head(name: str, numeric: bool, full: str = "") -> str:
    """A column's name, which sorts; `full` is shown where the pointer rests on it."""
    kind = ' class="number"' if numeric else ""
    return f'<th scope="col"{kind} title="{escape(full)}"><button type="button">{escape(name)}</button></th>'
