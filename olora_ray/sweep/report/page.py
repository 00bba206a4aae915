"""The report of a search: one self-contained page, its figures as files, and leaderboard.json."""

from collections.abc import Mapping
from functools import partial
from html import escape

from olora_ray.common import page, storage
from olora_ray.common.text import duration, plural
from olora_ray.sweep.record import SearchRecord
from olora_ray.sweep.report import text
from olora_ray.sweep.report.figures import FIGURES, render

# Name of a figure -> (text for screen readers, True if it takes the page's full width).
_DESCRIBED = {
    "parallel_coordinates": (
        "Parallel coordinates: the parameters of each trial and its value",
        True,
    ),
    "learning_curves": ("Learning curves of all trials", True),
    "learning_rate": ("Learning rate against the metric, by rank", True),
}


def write_report(record: SearchRecord, folder: str) -> list[str]:
    """Write report.html, the figures as PNG and leaderboard.json into `folder`, a path or URI; return the files.

    Replaces the files of an earlier report.
    """
    pictures = render({name: partial(draw, record) for name, draw in FIGURES.items()})
    return files(
        folder,
        pictures,
        {"leaderboard.json": record.to_json(), "report.html": html(record, pictures)},
    )


def files(folder: str, pictures: Mapping[str, bytes], texts: Mapping[str, str]) -> list[str]:
    """Write PNGs by the names of their figures, and texts by their file names; return the files."""
    contents = {f"{name}.png": png for name, png in pictures.items()}
    contents |= {name: content.encode() for name, content in texts.items()}
    for name, content in contents.items():
        storage.write_bytes(storage.join(folder, name), content)
    return [storage.join(folder, name) for name in contents]


def html(record: SearchRecord, pictures: Mapping[str, bytes]) -> str:
    figures = "\n".join(page.image(png, *_DESCRIBED[name]) for name, png in pictures.items())
    about = (
        f"{plural(len(record.trials), 'trial')} in {duration(record.seconds)}; searcher {record.searcher},"
        f" scheduler {record.scheduler}"
    )
    columns = [("trial", "number", "")]
    for field, name in text.short(record.fields).items():
        kind = "number" if text.numeric(record, field) else ""
        columns.append((name, kind, field))
    columns += [(name, "number", "") for name in (record.metric, "steps", "time")]
    columns += [(name, "", "") for name in ("status", "reason")]
    rows = [text.cells(record, trial) for trial in record.ordered()]
    table = page.table(columns, rows, 0 if record.best() else None)
    return page.document(
        f"{record.name}: search",
        f'<h1>{escape(record.name)}</h1>\n<p class="about">{escape(about)}</p>\n{_cards(record)}\n'
        f'<h2>Figures</h2>\n<div class="figures">\n{figures}\n</div>\n<h2>Trials</h2>\n{table}\n'
        "<footer>The figures are also PNG files beside this page, and leaderboard.json has the numbers.</footer>",
        text.verdict(record),
    )


def _cards(record: SearchRecord) -> str:
    best = record.best()
    facts = text.facts(record)
    if best is None or best.value is None:
        left = f'<p class="label">{escape(record.metric)}</p><p class="value">none</p>'
    else:
        facts = [(name, said) for name, said in facts if name != "best"]
        params = [(name, text.value(item)) for name, item in best.params.items()]
        way = "lowest" if record.mode == "min" else "highest"
        failed = any(trial.measured() and trial.status == "failed" for trial in record.trials)
        of = ""
        if failed and best.status != "failed":
            of = " among the trials that did not fail"
        left = (
            f'<div class="label">{way} {escape(record.metric)}{of}, trial {best.number}</div>'
            f'<div class="value">{escape(text.number(best.value, 5))}</div>{page.terms(params)}'
        )
    return f'<div class="cards"><div class="card best">{left}</div><div class="card">{page.terms(facts)}</div></div>'
