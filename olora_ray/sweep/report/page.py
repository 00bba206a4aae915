"""The report of a search: one self-contained page, its figures as files, and leaderboard.json."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from olora_ray.common import page, storage
from olora_ray.common.text import duration, plural
from olora_ray.sweep.record import SearchRecord
from olora_ray.sweep.report import text
from olora_ray.sweep.report.figures import FIGURES, render

DESCRIBED = {
    "parallel_coordinates": "Parallel coordinates: the parameters of each trial and its value",
    "learning_curves": "Learning curves of all trials",
    "learning_rate": "Learning rate against the metric, by rank",
}
"""Name of a figure -> its text for screen readers."""


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
    best = record.best()
    facts = text.facts(record)
    shown: dict[str, Any] = {"label": record.metric, "value": "none", "params": ()}
    if best is not None and best.value is not None:
        facts = [(name, said) for name, said in facts if name != "best"]
        way = "lowest" if record.mode == "min" else "highest"
        failed = any(trial.measured() and trial.status == "failed" for trial in record.trials)
        of = ""
        if failed and best.status != "failed":
            of = " among the trials that did not fail"
        shown = {
            "label": f"{way} {record.metric}{of}, trial {best.number}",
            "value": text.number(best.value, 5),
            "params": [(name, text.value(item)) for name, item in best.params.items()],
        }
    columns = [("trial", "number", "")]
    for field, name in text.short(record.fields).items():
        kind = "number" if text.numeric(record, field) else ""
        columns.append((name, kind, field))
    columns += [(name, "number", "") for name in (record.metric, "steps", "time")]
    columns += [(name, "", "") for name in ("status", "reason")]
    return page.rendered(
        "report.html",
        title=f"{record.name}: search",
        verdict=text.verdict(record),
        name=record.name,
        about=f"{plural(len(record.trials), 'trial')} in {duration(record.seconds)}; searcher {record.searcher},"
        f" scheduler {record.scheduler}",
        best=shown,
        facts=facts,
        figures=[(DESCRIBED[name], png) for name, png in pictures.items()],
        rows_title="Trials",
        heads=columns,
        rows=[text.cells(record, trial) for trial in record.ordered()],
        first_is_best=best is not None,
        footer="The figures are also PNG files beside this page, and leaderboard.json has the numbers.",
    )
