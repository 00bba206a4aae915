"""Say whether a finished run is better, by how much, and where it is wrong: a
verdict, and a page in one file.

    olora-ray look RUN [--open]

RUN             name in ./runs, or folder, of a finished run, search or
                comparison; or NAME@ALIAS of the registry
--open          open the page in a browser
--tracking-uri  for NAME@ALIAS: MLflow's address; default: MLFLOW_TRACKING_URI,
                else ./runs/mlflow.db

The page is report.html in that folder. It needs no network. Pages of earlier
releases have no verdict.
"""

import io
import re
import textwrap
import webbrowser
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import partial
from html import unescape
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from olora_ray.common import node_cache, page, storage
from olora_ray.common.errors import UserError, as_user_error, short_reason
from olora_ray.common.text import plural
from olora_ray.config import command_line
from olora_ray.config.schema import Config
from olora_ray.pipeline.run_folder import RunFolder, named, where_now

if TYPE_CHECKING:
    from olora_ray.common.statistics import Interval
    from olora_ray.pipeline.answers import Judged, Sample
    from olora_ray.tokens.store import TokenStore
    from olora_ray.train.checkpoint import TrainState

OTHER = "(no label)"
"""Column of the answers that are none of the labels."""
VERDICT = re.compile(r'<meta name="description" content="([^"]+)">')
SHOWN = 500
"""Largest number of answers on a page; the wrong ones come first."""


def main(argv: list[str]) -> None:
    given = command_line.parse(
        argv, usage=__doc__ or "", flags=["--open"], options=["--tracking-uri"]
    )
    if len(given.words) != 1:
        raise UserError("arguments: name one run, search, comparison or NAME@ALIAS; see --help")
    folder = _folder(given.words[0], given.options.get("--tracking-uri"))
    path = RunFolder(folder).page
    with as_user_error(f"{folder}: cannot be read", OSError, reason=short_reason):
        if not storage.exists(path):
            raise UserError(
                f"{path}: missing; the command of a run that is not finished resumes it"
            )
        known = VERDICT.search(storage.read_text(path))
    said = "no verdict: an earlier release wrote this page"
    if known:
        said = unescape(known[1])
    print(textwrap.fill(said, 80))
    print(path)
    if "--open" in given.flags:
        with node_cache.fetched(path) as local:
            webbrowser.open(Path(local).resolve().as_uri())


def _folder(name: str, tracking_uri: str | None) -> str:
    """Return the folder of a run, search or comparison; raise UserError if there is none."""
    from olora_ray.tracking import models, start

    uri = models.uri_of(name)
    if not uri:
        return named(name)
    version = models.resolve(uri, start.chosen_uri(tracking_uri))
    if not version.folder:
        raise UserError(f"{name}: the version does not name its run; name the run's folder")
    return where_now(version.folder, command_line.absolute("runs"))


def held_out_rows(store: "TokenStore | None") -> int | None:
    """Return the number of held-out rows; of preference pairs if there are some."""
    if store is None:
        return None
    return store.counts(range(len(store))).pairs or store.manifest.rows


def special_tokens(tokenizer: Any) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


# The verdict.


@dataclass(frozen=True)
class Ended:
    """A finished run, as its page shows it."""

    root: str
    config: Config
    state: "TrainState"
    result: Mapping[str, Any]
    """The content of result.json."""
    answers: "Sequence[Sample]"
    scored: "Judged"
    """The scores of the answers; empty if they are not scored."""
    marks: Sequence[str] = ()
    """The special tokens of the tokenizer, which prompts have in them."""
    facts: Mapping[str, str] = field(default_factory=dict)
    held_out: int | None = None
    """Number of held-out rows; None if it is not known."""

    @property
    def before(self) -> str:
        """The model before the training, in words."""
        return "before this training" if self.config.train.start else "the base model"

    @property
    def losses(self) -> tuple[float, float] | None:
        """Held-out loss before the training and of the export; None without held-out rows."""
        first = self.result.get("eval_loss_before")
        last = self.result.get("metrics", {}).get("eval/loss")
        if first is None or last is None:
            return None
        return first, last


@dataclass(frozen=True)
class Gain:
    """A score before and after the training."""

    name: str
    before: float
    after: float
    rows: int = 0
    change: "Interval | None" = None
    """None if the scores of the single rows are not known."""
    binary: bool = False
    """True if each row is right (1) or wrong (0)."""

    @property
    def in_words(self) -> str:
        said = f"{self.before:.3f} before, {self.after:.3f} after"
        if self.change is None:
            return f"{said}, interval not known"
        return f"{said}: {_interval(self.change)}, {plural(self.rows, 'row')}"


def _interval(change: "Interval") -> str:
    return f"{change.mean:+.2f}, 95% interval {change.low:+.2f} to {change.high:+.2f}"


def gains(ended: Ended) -> list[Gain]:
    """Return the scores of a run, the one that decides first: gate.metric, else exact_match, else the first."""
    from olora_ray.common.statistics import difference, resampled
    from olora_ray.pipeline.answers import rows_of
    from olora_ray.train.scoring import Judge

    found = []
    means = ended.result.get("scores") or {}
    for name, after in means.get("after", {}).items():
        pairs = [
            (old[name], new[name])
            for old, new in zip(*ended.scored, strict=True)
            if name in old and name in new
        ]
        if pairs:
            old, new = zip(*pairs, strict=True)
            binary = {*old, *new} <= {0.0, 1.0}
            change = difference(new, old)
            count = len(pairs)
            found.append(Gain(name, sum(old) / count, sum(new) / count, count, change, binary))
        elif name in means["before"]:
            change = None
            count = len(ended.answers)
            if ended.scored[1]:
                metric = partial(Judge(str(ended.config.evaluation.scorer)).number, name)
                before = rows_of(ended.answers, "before")
                both = zip(rows_of(ended.answers, "after"), before, strict=True)
                change = resampled(metric, [*both], range(count))
            found.append(Gain(name, means["before"][name], after, count, change))
    wanted = [ended.config.gate.metric.removeprefix("eval/"), "exact_match"]
    found.sort(key=lambda gain: wanted.index(gain.name) if gain.name in wanted else len(wanted))
    return found


def verdict(ended: Ended, scores: Sequence[Gain]) -> tuple[str, str]:
    """Return whether the run is better and by how much, and "good", "bad" or "" (nothing is shown)."""
    few = ended.config.gate.min_rows
    metrics = ended.result.get("metrics", {})
    preferred = metrics.get("eval/pairs/preferred")
    if preferred is not None:
        return _of_pairs(ended, preferred, few)
    if scores:
        return _of_scores(ended, scores[0], few)
    if ended.losses is None:
        return "no rows were held out, so nothing says whether the model is better", ""
    before, after = ended.losses
    said = f"held-out loss {after:.4f}, {ended.before} {before:.4f}"
    if after < before:
        return f"{said}: it fell, but no answer was scored, so it is open how many are right", ""
    return f"{said}: no better", "bad"


def _of_scores(ended: Ended, gain: Gain, few: int) -> tuple[str, str]:
    said = f"{gain.name} {gain.after:.3f}, {ended.before} {gain.before:.3f}"
    if gain.binary:
        before = f"{ended.before} {round(gain.before * gain.rows)} of {gain.rows}"
        said = f"{round(gain.after * gain.rows)} of {gain.rows} right, {before}"
    if gain.change is None:
        return f"{said}: without the scores of the rows there is no interval", ""
    numbers = f"{gain.name} {_interval(gain.change)}"
    return _decided(said, gain.rows, few, (gain.change.low, gain.change.high), numbers)


def _of_pairs(ended: Ended, preferred: float, few: int) -> tuple[str, str]:
    """Return the verdict on the share of pairs whose better answer gained more; by chance it is 1/2."""
    from olora_ray.common.statistics import share

    said = f"the model prefers the better answer in {preferred:.0%} of the held-out pairs"
    rows = ended.held_out
    if not rows:
        return f"{said}: their number is not known, so there is no interval", ""
    bounds = share(preferred, rows)
    numbers = (
        f"95% interval {bounds.low:.0%} to {bounds.high:.0%}, {plural(rows, 'pair')}, chance is 50%"
    )
    return _decided(said, rows, few, (bounds.low - 0.5, bounds.high - 0.5), numbers)


def _decided(
    said: str, rows: int, few: int, bounds: tuple[float, float], numbers: str
) -> tuple[str, str]:
    if rows < few:
        return f"too few rows to say ({rows} of the {few} that gate.min_rows asks for): {said}", ""
    if bounds[0] > 0:
        return f"{said}: the gain is real ({numbers})", "good"
    if bounds[1] < 0:
        return f"{said}: it is worse ({numbers})", "bad"
    return f"{said}: no difference is shown ({numbers})", ""


# The page.


CHANGES = {
    "broken": "right before, wrong after",
    "wrong": "wrong before and after",
    "fixed": "wrong before, right after",
    "right": "right before and after",
}
"""Kinds of answers in the order of the page, in words."""
LABELS = 50
"""References that are more different than these are texts and no labels."""
LOSSES = {
    "train/loss": "training, each step on its own rows",
    "eval/loss": "held out",
    "eval/guard/loss": "other texts",
}
SOURCE = "eval/loss/"
"""Beginning of the metric of a source."""
MARGINS = {
    "eval/pairs/margin": "margin, held out",
    "eval/pairs/chosen": "log p of the chosen answers, held out",
}
"""Metric -> its name in a figure."""


def write(ended: Ended, url: str | None) -> str:
    """Write the page of a run, and return its verdict; `url` is the run's page on an MLflow server."""
    from olora_ray.pipeline.report import next_steps

    scores = gains(ended)
    said, grade = verdict(ended, scores)
    rows = _rows(ended, scores)
    counts = Counter(row["change"] for row in rows)
    labels = _labels(ended)
    metrics = ended.result.get("metrics", {})
    curves = [_curve(ended.state.history, "loss (nats per token)", LOSSES)]
    sources = {name: name.removeprefix(SOURCE) for name in metrics if name.startswith(SOURCE)}
    if sources:
        curves.append(_curve(ended.state.history, "held-out loss of each source", sources))
    if "eval/pairs/margin" in metrics:
        curves.append(_curve(ended.state.history, "nats per pair since the first step", MARGINS))
    text = page.rendered(
        "run.html",
        title=f"{ended.config.run.name}: run",
        run=ended.config.run.name,
        verdict=said,
        grade=grade,
        missing=[*_missing(ended, scores)],
        answers=rows[:SHOWN],
        total=len(rows),
        scored=any(row["change"] for row in rows),
        changes=CHANGES,
        counts=counts,
        gains=scores,
        curves=curves,
        sources=sources,
        first=next((row for row in ended.state.history if "eval/loss" in row), {}),
        last=metrics,
        advice=[*_advice(ended, labels)],
        commands=[
            f"olora-ray chat {quote(ended.root)}",
            *next_steps(ended.result, url),
        ],
        facts=ended.facts,
        **labels,
    )
    storage.write_text(RunFolder(ended.root).page, text)
    return said


def note(verdict: str, facts: Mapping[str, str]) -> str:
    """Return the description of the run in MLflow, as Markdown."""
    lines = [f"- **{fact}**: {said}" for fact, said in facts.items()]
    return "\n".join([verdict, "", *lines])


def _missing(ended: Ended, scores: Sequence[Gain]) -> Iterator[str]:
    if ended.losses is None:
        yield "held-out rows: set data.eval or data.eval_fraction"
    if not ended.answers:
        yield "answers: the run has generated none; evaluation.samples sets their number"
    if not scores:
        yield "scores: the run has none; evaluation.scorer=exact_match counts right answers"


def _rows(ended: Ended, scores: Sequence[Gain]) -> list[dict[str, Any]]:
    """Return the answers, wrong ones first; a score below 1 is wrong."""
    rows = []
    before, after = ended.scored
    # Not a score of all answers together.
    name = next((gain.name for gain in scores if any(gain.name in row for row in after)), None)
    for number, each in enumerate(ended.answers):
        change = ""
        if name is not None:
            was = before[number].get(name, 0.0) >= 1
            now = after[number].get(name, 0.0) >= 1
            change = {(1, 0): "broken", (0, 0): "wrong", (0, 1): "fixed", (1, 1): "right"}[was, now]
        wanted, answer = _differences(each.reference, each.after)
        row = {"prompt": plain(each.prompt, ended.marks), "label": each.reference, "change": change}
        rows.append({**row, "wanted": wanted, "before": each.before, "after": answer})
    order = ["", *CHANGES]
    rows.sort(key=lambda row: order.index(str(row["change"])))
    return rows


def plain(prompt: str, marks: Sequence[str]) -> str:
    """Return a prompt without the special tokens and role names of its chat template."""
    parts = [prompt]
    if marks:
        parts = re.split("|".join(map(re.escape, marks)), prompt)
    text = "\n".join(part.strip() for part in parts if part.strip())
    text = re.sub(r"\n(assistant|model)\s*$", "", text)
    if marks:
        text = re.sub(r"(?m)^(system|user|assistant|model|tool)\n+", r"\1: ", text)
    return text.removeprefix("user: ")


WORD = re.compile(r"\w+|\s+|[^\w\s]")
Parts = list[tuple[bool, str]]
"""A text in parts; True: the part differs."""


def _differences(reference: str, answer: str) -> tuple[Parts, Parts]:
    """Return the reference and the answer, with the words marked that the other one does not have there."""
    ours = re.findall(WORD, reference)
    theirs = re.findall(WORD, answer)
    wanted: Parts = []
    given: Parts = []
    matcher = SequenceMatcher(None, ours, theirs, autojunk=False)
    for kind, first, last, start, end in matcher.get_opcodes():
        wanted.append((kind != "equal", "".join(ours[first:last])))
        given.append((kind != "equal", "".join(theirs[start:end])))
    return wanted, given


def _labels(ended: Ended) -> dict[str, Any]:
    """Return the confusion matrix and the numbers of each label; {} if the references are no labels."""
    wanted = [each.reference for each in ended.answers]
    given = [each.after for each in ended.answers]
    names = sorted(set(wanted))
    # References that hardly repeat are texts.
    if not 1 < len(names) <= min(LABELS, len(wanted) // 2) or any("\n" in name for name in names):
        return {}
    from sklearn.metrics import (  # type: ignore[import-untyped]
        classification_report,
        confusion_matrix,
    )

    columns = [*names, OTHER]
    given = [answer if answer in names else OTHER for answer in given]
    matrix = confusion_matrix(wanted, given, labels=columns)
    return {
        "labels": names,
        "numbers": classification_report(
            wanted, given, labels=names, output_dict=True, zero_division=0
        ),
        "answered": matrix.sum(axis=0).tolist(),
        "columns": columns,
        "confusion": matrix[:-1].tolist(),
    }


def _advice(ended: Ended, found: Mapping[str, Any]) -> Iterator[str]:
    """Return what the numbers say to do next."""
    few = ended.config.gate.min_rows
    rows = len(ended.answers) if ended.config.evaluation.scorer else ended.held_out
    if rows is not None and 0 < rows < few:
        yield f"Measure on {few} rows or more: raise evaluation.rows, data.eval_fraction or add rows to data.eval."
    if ended.state.best_step == 0 < ended.state.step:
        yield "No step has improved the held-out loss, so the export is the untrained model: lower train.lr."
    names = found.get("labels", [])
    wanted = Counter(each.reference for each in ended.answers)
    for name in names:
        if wanted[name] <= 2:
            yield f"Collect rows of {name!r}: {wanted[name]} of it held out says little."
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault("".join(name.split()).casefold(), name)
        if other != name:
            yield f"Make {other!r} and {name!r} one label: they differ only by blanks or capitals."


def _curve(history: Sequence[Mapping[str, float]], unit: str, labels: Mapping[str, str]) -> str:
    """Return a figure as SVG in the colour of the page's text; a loss has a logarithmic axis."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    with matplotlib.rc_context({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "olora"}):
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        axes = figure.subplots()
        positive = True
        known = {name for row in history for name in row}
        for name, label in labels.items():
            if name not in known:
                continue
            form = "-" if name.startswith("train/") else "o-"
            rows = [row for row in history if name in row]
            rows = rows[:: len(rows) // 1000 + 1]
            values = [row[name] for row in rows]
            positive = positive and all(value > 0 for value in values)
            axes.plot([row["step"] for row in rows], values, form, label=label)
        if positive:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="step", ylabel=unit)
        axes.grid(axis="y", alpha=0.3)
        axes.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawn = buffer.getvalue()
    return drawn[drawn.index("<svg") :].replace("#000000", "currentColor")
