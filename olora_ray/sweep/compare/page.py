"""What a comparison leaves for people and programs: one page that needs nothing else, its figures, comparison.json."""

import io
from html import escape
from typing import TYPE_CHECKING

from olora_ray.sweep.compare import table, verdict
from olora_ray.sweep.compare.figures import FIGURES
from olora_ray.sweep.compare.grid import BASELINE
from olora_ray.sweep.compare.record import ComparisonRecord, Point
from olora_ray.sweep.report import html as tags
from olora_ray.sweep.report import text
from olora_ray.sweep.report.write import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DESCRIBED = {
    "learning_rates": ("Loss on the tuning rows against the learning rate, a line for each method", True),
    "curves": ("Held-out loss over the steps at the tuned learning rates", False),
    "differences": (f"Differences to {BASELINE} with their intervals", False),
}
"""Name of the figure -> (what a screen reader says, whether it takes the page's width)."""


def write(record: ComparisonRecord, folder: str) -> list[str]:
    """Write report.html, the figures as PNG and comparison.json into `folder`, a path or URI; what was written."""
    pictures = {name: _png(draw(record)) for name, draw in FIGURES.items()}
    return files(folder, pictures, {"comparison.json": record.to_json(), "report.html": html(record, pictures)})


def html(record: ComparisonRecord, pictures: dict[str, bytes]) -> str:
    """The page; `pictures` are PNGs by the names of FIGURES."""
    figures = "\n".join(tags.image(png, *_DESCRIBED[name]) for name, png in pictures.items())
    verdicts = "".join(f"<p>{escape(sentence)}</p>" for sentence in verdict.sentences(record))
    also = [*((f"score {line.partition(':')[0]}", line.partition(": ")[2]) for line in table.scores(record))]
    also += [("untuned", line) for line in [table.untuned(record)] if line]
    also += [("note", note) for note in record.notes]
    aside = f'<div class="card">{tags.terms(also)}</div>' if also else ""
    return tags.document(
        f"{record.name}: comparison",
        f'<h1>{escape(record.name)}</h1>\n<p class="about">{escape(table.about(record))}</p>\n'
        f'<div class="card best">{verdicts}</div>\n{aside}\n<h2>Methods</h2>\n{_methods(record)}\n'
        f'<h2>Figures</h2>\n<div class="figures">\n{figures}\n</div>\n<h2>Tuning</h2>\n{_points(record)}\n'
        "<footer>A click on a column's name sorts the first table, the pointer on it says what it has. All numbers,"
        " also of each seed, are in comparison.json.</footer>",
    )


def _methods(record: ComparisonRecord) -> str:
    heads = "".join(
        tags.head(name, place > 0, means)
        for place, (name, means) in enumerate(zip(table.HEAD, table.MEANS, strict=True))
    )
    rows = "\n".join(
        f"<tr>{''.join(tags.cell(shown, kind='number' if place else '') for place, shown in enumerate(row))}</tr>"
        for row in (table.cells(record, each) for each in record.methods)
    )
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'


def _points(record: ComparisonRecord) -> str:
    """Every trial of the tuning, so that a reader can judge the grids."""
    names = ("method", "alpha", "train.lr", "loss on the tuning rows", "")
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    rows = "\n".join(f"<tr>{''.join(map(tags.cell, _point(record, point)))}</tr>" for point in record.points)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'


def _point(record: ComparisonRecord, point: Point) -> list[str]:
    tuned = record.of(point.method).tuned
    chosen = tuned and (tuned.cell.alpha, tuned.cell.lr) == (point.alpha, point.lr)
    word = "tuned" if chosen else "" if point.grid else "untuned"
    loss = f"{point.loss:.4f}" if point.loss < float("inf") else "broke off"
    if record.base_tuning < point.loss < float("inf"):
        word = "above the base model"
    return [point.method, f"{point.alpha:g}", text.number(point.lr), loss, word]


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
