"""The report of a search: one page that needs nothing else, its figures as files, and leaderboard.json."""

import io
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING

from olora_ray.common import storage
from olora_ray.common.text import duration, plural
from olora_ray.sweep.record import SearchRecord, TrialRecord
from olora_ray.sweep.report import axis, leaderboard, style, text
from olora_ray.sweep.report import html as page
from olora_ray.sweep.report.figures import FIGURES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DESCRIBED = {
    "parallel_coordinates": ("Parallel coordinates: the parameters of each trial and its value", True),
    "learning_curves": ("Learning curves of all trials", True),
    "learning_rate": ("Learning rate against the metric, by rank", False),
    "importance": ("Importance of each parameter", False),
}
"""Name of the figure -> (what a screen reader says, whether it takes the page's width)."""


MOST_DRAWN = 300
"""Trials in a figure: more lines hide each other, and the time to draw them would grow with the search."""
MOST_ROWS = 500
"""Trials in the table of the page, which would grow to many megabytes."""


def write(record: SearchRecord, folder: str) -> list[str]:
    """Write report.html, the figures as PNG and leaderboard.json into `folder`, a path or URI; what was written.

    Files of an earlier report are replaced, so it can be called while the search continues.
    """
    pictures = _pictures(record)
    return files(folder, pictures, {"leaderboard.json": record.to_json(), "report.html": html(record, pictures)})


def files(folder: str, pictures: Mapping[str, bytes], texts: Mapping[str, str]) -> list[str]:
    """Write PNGs by the names of their figures, and texts by those of their files; what was written."""
    written = []
    for name, png in pictures.items():
        written.append(storage.join(folder, f"{name}.png"))
        storage.write_bytes(written[-1], png)
    for name, content in texts.items():
        written.append(storage.join(folder, name))
        storage.write_text(written[-1], content)
    return written


def _pictures(record: SearchRecord) -> dict[str, bytes]:
    """The PNGs by the names of FIGURES."""
    some = record.thinned(MOST_DRAWN)
    return {name: _png(style.some(draw(some), len(some.trials), len(record.trials))) for name, draw in FIGURES.items()}


def html(record: SearchRecord, pictures: dict[str, bytes]) -> str:
    """The page; `pictures` are PNGs by the names of FIGURES."""
    figures = "\n".join(page.image(png, *_DESCRIBED[name]) for name, png in pictures.items())
    about = (
        f"{plural(len(record.trials), 'trial')} in {duration(record.seconds)}; searcher {record.searcher},"
        f" scheduler {record.scheduler}"
    )
    return page.document(
        f"{record.name}: search",
        f'<h1>{escape(record.name)}</h1>\n<p class="about">{escape(about)}</p>\n{_cards(record)}\n'
        f'<h2>Figures</h2>\n<div class="figures">\n{figures}\n</div>\n<h2>Trials</h2>\n{_table(record)}\n'
        f"<footer>A click on a column's name sorts.{_thinned(record)} The same figures are PNG files beside this page,"
        " the numbers are in leaderboard.json.</footer>",
    )


def _thinned(record: SearchRecord) -> str:
    if len(record.trials) <= MOST_DRAWN:
        return ""
    return f" Figures show {MOST_DRAWN} of {len(record.trials):,} trials, evenly from the best to the worst."


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _cards(record: SearchRecord) -> str:
    best = record.best()
    facts = [(name, said) for name, said in leaderboard.facts(record) if best is None or name != "best"]
    if best is None or best.value is None:
        left = f'<p class="label">{escape(record.metric)}</p><p class="value">none</p>'
    else:
        params = [(name, text.value(item)) for name, item in best.params.items()]
        way = "lowest" if record.mode == "min" else "highest"
        others = any(trial.measured() and trial.status == "failed" != best.status for trial in record.trials)
        of = " of those that did not fail" if others else ""
        left = (
            f'<div class="label">{way} {escape(record.metric)}{of}, trial {best.number}</div>'
            f'<div class="value">{escape(text.number(best.value, 5))}</div>{page.terms(params)}'
        )
    return f'<div class="cards"><div class="card best">{left}</div><div class="card">{page.terms(facts)}</div></div>'


def _table(record: SearchRecord) -> str:
    fields = record.columns()
    names = text.short(fields)
    numeric = {name: all(axis.is_number(t.params.get(name, 0)) for t in record.trials) for name in fields}
    heads = [page.head("trial", True), *(page.head(names[name], numeric[name], name) for name in fields)]
    heads += [page.head(name, True) for name in (record.metric, "steps", "time")]
    heads += [page.head(name, False) for name in ("status", "reason")]
    ordered, best = record.ordered(), record.best()
    shown = ordered[:MOST_ROWS]
    default = record.of(record.default)
    if default is not None and default not in shown:
        shown = [*shown, default]
    rows = "\n".join(_row(record, trial, numeric, trial is best) for trial in shown)
    table = (
        f'<div class="scroll"><table><thead><tr>{"".join(heads)}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'
    )
    left = len(ordered) - len(shown)
    what = "all worse, failed or without a value"
    return table + (f'<p class="about">{left:,} more, {what}, are in leaderboard.json.</p>' if left else "")


def _row(record: SearchRecord, trial: TrialRecord, numeric: dict[str, bool], best: bool) -> str:
    default = " (default)" if trial.number == record.default else ""
    cells = [page.cell(f"{trial.number}{default}", trial.number, "number")]
    for name, is_numeric in numeric.items():
        item = trial.params.get(name)
        shown = text.value(item) if name in trial.params else ""
        cells.append(page.cell(shown, item if axis.is_number(item) else shown, "number" if is_numeric else ""))
    shown = "" if trial.value is None else text.number(trial.value, 5)
    cells += [
        page.cell(shown, trial.value if trial.measured() else "", "number"),
        page.cell(text.steps(trial.step, trial.total), trial.step, "number"),
        page.cell(duration(trial.seconds), trial.seconds, "number"),
        page.tagged(trial.status),
        page.cell(trial.reason, kind="reason"),
    ]
    kind = ' class="best"' if best else ""
    return f"<tr{kind}>{''.join(cells)}</tr>"
