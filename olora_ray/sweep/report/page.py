"""The report of a search: one self-contained page, its figures as files, and leaderboard.json."""

import base64
from collections.abc import Iterable, Mapping
from functools import partial
from html import escape
from string import Template

from olora_ray.common import storage
from olora_ray.common.text import duration, plural
from olora_ray.sweep.record import SearchRecord
from olora_ray.sweep.report import text
from olora_ray.sweep.report.figures import FIGURES, render

# Name of a figure -> (text for screen readers, True if it takes the page's full width).
_DESCRIBED = {
    "parallel_coordinates": ("Parallel coordinates: the parameters of each trial and its value", True),
    "learning_curves": ("Learning curves of all trials", True),
    "learning_rate": ("Learning rate against the metric, by rank", True),
}

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


def write_report(record: SearchRecord, folder: str) -> list[str]:
    """Write report.html, the figures as PNG and leaderboard.json into `folder`, a path or URI; return the files.

    Replaces the files of an earlier report.
    """
    pictures = render({name: partial(draw, record) for name, draw in FIGURES.items()})
    return files(folder, pictures, {"leaderboard.json": record.to_json(), "report.html": html(record, pictures)})


def files(folder: str, pictures: Mapping[str, bytes], texts: Mapping[str, str]) -> list[str]:
    """Write PNGs by the names of their figures, and texts by their file names; return the files."""
    contents = {f"{name}.png": png for name, png in pictures.items()}
    contents |= {name: content.encode() for name, content in texts.items()}
    for name, content in contents.items():
        storage.write_bytes(storage.join(folder, name), content)
    return [storage.join(folder, name) for name in contents]


def html(record: SearchRecord, pictures: Mapping[str, bytes]) -> str:
    figures = "\n".join(image(png, *_DESCRIBED[name]) for name, png in pictures.items())
    about = (
        f"{plural(len(record.trials), 'trial')} in {duration(record.seconds)}; searcher {record.searcher},"
        f" scheduler {record.scheduler}"
    )
    return document(
        f"{record.name}: search",
        f'<h1>{escape(record.name)}</h1>\n<p class="about">{escape(about)}</p>\n{_cards(record)}\n'
        f'<h2>Figures</h2>\n<div class="figures">\n{figures}\n</div>\n<h2>Trials</h2>\n{_table(record)}\n'
        "<footer>The figures are also PNG files beside this page, and leaderboard.json has the numbers.</footer>",
    )


def _cards(record: SearchRecord) -> str:
    best = record.best()
    facts = [(name, said) for name, said in text.facts(record) if best is None or name != "best"]
    if best is None or best.value is None:
        left = f'<p class="label">{escape(record.metric)}</p><p class="value">none</p>'
    else:
        params = [(name, text.value(item)) for name, item in best.params.items()]
        way = "lowest" if record.mode == "min" else "highest"
        others = any(trial.measured() and trial.status == "failed" != best.status for trial in record.trials)
        of = " among the trials that did not fail" if others else ""
        left = (
            f'<div class="label">{way} {escape(record.metric)}{of}, trial {best.number}</div>'
            f'<div class="value">{escape(text.number(best.value, 5))}</div>{terms(params)}'
        )
    return f'<div class="cards"><div class="card best">{left}</div><div class="card">{terms(facts)}</div></div>'


def _table(record: SearchRecord) -> str:
    names = text.short(record.fields)
    columns = [("trial", True, ""), *((names[name], text.numeric(record, name), name) for name in record.fields)]
    columns += [(name, True, "") for name in (record.metric, "steps", "time")]
    columns += [(name, False, "") for name in ("status", "reason")]
    kinds, best, rows = ["number" if numeric else "" for _, numeric, _ in columns], record.best(), []
    for trial in record.ordered():
        cells = "".join(map(cell, text.cells(record, trial), kinds))
        rows.append(f'<tr class="{"best" if trial is best else ""}">{cells}</tr>')
    return table((head(*column) for column in columns), rows)
