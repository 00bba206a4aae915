"""A page in one file, with figures: the style of the reports of runs, searches and comparisons."""

import base64
import io
from collections.abc import Callable, Iterable, Mapping
from html import escape
from string import Template
from typing import TYPE_CHECKING, Any

from olora_ray.common import storage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Only the best trial has the colour BEST, in figures and on pages.
BEST, INK, MUTED, GRID, FAILED = "#d55e00", "#1f2933", "#5f6c7b", "#e4e7eb", "#8c2d72"
# Okabe and Ito's palette without BEST. Colour-blind people can tell these colours apart.
COLOURS = ("#0072b2", "#009e73", "#cc79a7", "#e0a100", "#56b4e9", "#4d4d4d")
Draw = Callable[[], "Figure"]


def render(draws: Mapping[str, Draw]) -> dict[str, bytes]:
    """Return PNGs by the names of their figures, drawn in the style of the reports."""
    import matplotlib

    style: Any = {
        "text.parse_math": False,  # a `$` in a name must not start a formula
        "text.color": INK,
        "axes.edgecolor": MUTED,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "savefig.dpi": 150,
        "font.size": 9,
        "legend.frameon": False,
    }
    pictures = {}
    with matplotlib.rc_context(style):
        for name, draw in draws.items():
            draw().savefig(buffer := io.BytesIO(), format="png")
            pictures[name] = buffer.getvalue()
    return pictures


def new(title: str, caption: str, width: float = 6.8, height: float = 4.4) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", size=13, weight="bold")
    figure.supxlabel(caption, x=0.01, ha="left", size=9, color=MUTED)
    return figure, figure.add_subplot()


def say(axes: "Axes", sentence: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, sentence, transform=axes.transAxes, ha="center", va="center", size=12, color=MUTED)


def legend(axes: "Axes", title: str = "") -> None:
    # To the right of the axes, where it hides no line.
    if axes.get_legend_handles_labels()[0]:
        axes.legend(title=title or None, loc="upper left", bbox_to_anchor=(1.01, 1.0), alignment="left")


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
    return f'<figure{kind}><img alt="{escape(described)}" src="data:image/png;base64,{data}"></figure>'


def terms(pairs: Iterable[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(said)}</dd>" for name, said in pairs) + "</dl>"


def cell(shown: str, kind: str = "") -> str:
    return f'<td class="{kind}">{escape(shown)}</td>'


def head(name: str, numeric: bool, full: str = "") -> str:
    kind = "number" if numeric else ""
    return f'<th scope="col" class="{kind}" title="{escape(full)}">{escape(name)}</th>'


def table(heads: Iterable[str], rows: Iterable[str]) -> str:
    body = "\n".join(rows)
    return (
        f'<div class="scroll"><table><thead><tr>{"".join(heads)}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
    )


def files(folder: str, pictures: Mapping[str, bytes], texts: Mapping[str, str]) -> list[str]:
    """Write PNGs by the names of their figures, and texts by their file names; return the files."""
    contents = {f"{name}.png": png for name, png in pictures.items()}
    contents |= {name: content.encode() for name, content in texts.items()}
    for name, content in contents.items():
        storage.write_bytes(storage.join(folder, name), content)
    return [storage.join(folder, name) for name in contents]
