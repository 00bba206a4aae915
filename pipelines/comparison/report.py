"""The report of a comparison: its verdict in sentences, a table, figures, one self-contained page, and MLflow.

No difference is named without its interval, and without the rows, seeds and model that it was measured on.
"""

import logging
import math
from collections.abc import Sequence
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any

from comparison.grid import BASELINE
from comparison.record import Against, ComparisonRecord, MethodRecord, Point
from olora_ray.common import node_cache, storage
from olora_ray.common.text import aligned, duration, plural
from olora_ray.sweep.report import figures, page, text
from olora_ray.tracking.run import Tracker

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger("olora_ray.comparison")

ERROR = 0.05
"""A difference counts if its p value is below this."""
HEAD = (
    "method",
    "tuned lr",
    "alpha",
    "test loss",
    f"- {BASELINE}",
    "interval",
    "p (Holm)",
    f"steps to {BASELINE}'s loss",
    f"/ {BASELINE}'s",
    "seconds",
    "init",
    "factors",
    "trainable",
    "tuning",
)
MEANS = (
    "adapter.method",
    "train.lr with the lowest loss on the tuning rows; * means that it lies at the end of the grid",
    "adapter.alpha",
    "loss per supervised token after the last step: mean over seeds and test rows, ± half of its 95% interval",
    f"this method's loss minus {BASELINE}'s, in nats per supervised token, on the same rows with the same seeds",
    "95% interval of this difference, wide enough to hold for all methods together (Bonferroni)",
    "p value: chance of such a difference if there were none, adjusted for the number of comparisons (Holm)",
    f"steps until the test loss is down to {BASELINE}'s last loss with the same seed: the median over seeds (the"
    " later of the middle two); > means that it was not reached in so many",
    f"these steps divided by {BASELINE}'s: median (lowest .. highest) over seeds",
    "seconds of the initialisation and of these steps, in the median training",
    "seconds of the initialisation in one process",
    "megabytes of factors that workers exchange",
    "trained parameters, in millions",
    "trials; trials that broke off or ended above the base model; largest / smallest rate as good as the best",
)
"""The meaning of each column."""


def conclude(record: ComparisonRecord, folder: str, tracker: Tracker) -> None:
    """Write page, figures and comparison.json, log them to MLflow, and log the verdict."""
    for file in write(record, folder):
        with node_cache.fetched(file) as local:
            tracker.artifact(local)
    tracker.table("methods", list(HEAD), [cells(record, each) for each in record.methods])
    tracker.metrics({0: metrics(record)})
    tracker.tags({f"olora.verdict.{each.method}": sentence(record, each) for each in record.others()})
    for line in [*lines(record), *summary(record)]:
        logger.info(line)
    logger.info(f"report: {storage.join(folder, 'report.html')}")


def metrics(record: ComparisonRecord) -> dict[str, float]:
    """Return numbers for MLflow: loss/METHOD, difference/METHOD and the bounds of its adjusted interval."""
    numbers = {f"loss/{each.method}": each.loss for each in record.methods if each.loss is not None}
    for each in record.others():
        if each.against is not None:
            bounds = each.against.adjusted
            numbers |= {f"difference/{each.method}": each.against.mean}
            numbers |= {f"difference_low/{each.method}": bounds.low, f"difference_high/{each.method}": bounds.high}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def sentences(record: ComparisonRecord) -> list[str]:
    return [sentence(record, each) for each in record.others()]


def sentence(record: ComparisonRecord, method: MethodRecord) -> str:
    """Return the verdict on a method, with the rows, seeds and model that it holds for."""
    if method.against is None:
        return f"{method.method} against {BASELINE}: not compared, because {_why_not(record, method)}."
    difference = method.against
    rates = f"each at the learning rate that was best on {record.rows['tuning']} other rows"
    return (
        f"Loss of {method.method} minus loss of {BASELINE} = {difference.mean:+.4f} nats per token"
        f" ({_interval(record, difference)}): {conclusion(difference, record.relevant)}. Measured with"
        f" {plural(len(record.seeds), 'seed')} x {_rows(record)} of {record.task} with {record.model}, {rates}."
        f"{_reservations(record, method)}"
    )


def conclusion(difference: Against, relevant: float) -> str:
    """Return the result in words: Holm's p value says if there is a difference, the interval how large it is."""
    low, high = difference.adjusted.low, difference.adjusted.high
    bound, lower, differs = f"{relevant:g}", difference.mean < 0, difference.p_holm < ERROR
    if difference.adjusted.inside(relevant):
        which = f"; the loss is {'lower' if lower else 'higher'}, but by less than that" if differs else ""
        return f"equivalent within {bound}, which compare.relevant sets as the smallest difference that matters{which}"
    if not differs:
        return f"undecided: neither a difference nor equivalence within {bound} is shown; use more seeds or test rows"
    word = "lower" if lower else "higher"
    if high <= -relevant or low >= relevant:
        return f"the loss is {word} by at least {bound}, so the difference matters"
    return f"the loss is {word}, but perhaps by less than {bound}, the smallest difference that matters"


def _interval(record: ComparisonRecord, difference: Against) -> str:
    low, high = difference.adjusted.low, difference.adjusted.high
    others = len([each for each in record.others() if each.against])
    p_value = text.number(difference.p_holm, 2)
    adjusted = f" for {others} comparisons together, p = {p_value} (Holm)" if others > 1 else ""
    return f"{record.level:.0%} interval {low:+.4f} .. {high:+.4f}{adjusted}"


def _rows(record: ComparisonRecord) -> str:
    rows = record.rows["test"]
    return f"{rows} test rows" if record.groups == rows else f"{record.groups} groups of {rows} test rows"


def _why_not(record: ComparisonRecord, method: MethodRecord) -> str:
    for each in (record.of(BASELINE), method):
        if each.tuned is None:
            return f"every tuning trial of {each.method} broke off"
        if broken := each.broke_off():
            return f"{plural(broken, 'training')} of {len(each.trainings)} of {each.method} broke off"
    return "nothing was measured"


def _reservations(record: ComparisonRecord, method: MethodRecord) -> str:
    reservations = []
    for each in (record.of(BASELINE), method):
        if each.tuned is not None and not each.tuned.inside:
            reservations.append(f"the best learning rate of {each.method} is at the end of its grid, not inside it")
        if each.loss is not None and math.isfinite(record.base_test) and each.loss > record.base_test:
            reservations.append(f"{each.method} ends with a higher loss than the base model")
    if len(record.seeds) < 4:
        reservations.append(f"{len(record.seeds)} seeds are few, use 4 or more")
    return f" But {'; '.join(reservations)}." if reservations else ""


def cells(record: ComparisonRecord, method: MethodRecord) -> list[str]:
    tuned, against = method.tuned, method.against
    reached, ratio = record.typical(method.method), record.ratio(method.method)
    return [
        method.method,
        f"{text.number(tuned.cell.lr)}{'' if tuned.inside else '*'}" if tuned else "none",
        f"{tuned.cell.alpha:g}" if tuned else "",
        _loss(method),
        f"{against.mean:+.4f}" if against else "",
        f"{against.adjusted.low:+.4f} .. {against.adjusted.high:+.4f}" if against else "",
        text.number(against.p_holm, 2) if against else "",
        reached.shown(reached.steps) if reached else "",
        ratio.shown() if ratio else "",
        reached.shown(reached.seconds) if reached else "",
        f"{method.init_seconds:.1f} s",
        f"{method.exchanged / 1e6:.1f} MB",
        f"{method.trainable / 1e6:.2f} M",
        f"{tuned.points}, {tuned.diverged} diverged, x{tuned.width:g}" if tuned else "all broke off",
    ]


def _loss(method: MethodRecord) -> str:
    if method.loss is None or method.half is None:
        broken = method.broke_off()
        return f"{broken} of {len(method.trainings)} broke off" if broken else ""
    return f"{method.loss:.4f} ± {method.half:.4f}"


def lines(record: ComparisonRecord) -> list[str]:
    rows = [list(HEAD), *(cells(record, each) for each in record.methods)]
    return aligned(rows, [False, *[True] * (len(HEAD) - 1)])


def summary(record: ComparisonRecord) -> list[str]:
    return [
        f"of: {about(record)}",
        *(f"scores: {line}" for line in scores(record)),
        *(f"untuned: {line}" for line in [untuned(record)] if line),
        *(f"verdict: {sentence}" for sentence in sentences(record)),
    ]


def about(record: ComparisonRecord) -> str:
    rows = ", ".join(f"{count:,} {name}" for name, count in record.rows.items())
    return (
        f"{record.model} on {record.task}; rows {rows}; {plural(record.steps, 'step')} of {record.global_batch}"
        f" sequences, rank {record.rank}; tuned with seed {record.tuning_seed}, compared with seeds"
        f" {record.seeds[0]} .. {record.seeds[-1]}; base model {record.base_test:.4f} on the test rows;"
        f" {record.machine}, {duration(record.seconds)}"
    )


def scores(record: ComparisonRecord) -> list[str]:
    by_method = {each.method: each.scores() for each in record.methods}
    names = dict.fromkeys(name for of_method in by_method.values() for name in of_method)
    return [
        f"{name}: {', '.join(f'{method} {each[name]:.3f}' for method, each in by_method.items() if name in each)}"
        for name in names
    ]


def untuned(record: ComparisonRecord) -> str:
    """Return the losses of a comparison at the config's own learning rate; empty if it was not asked for."""
    points = [point for each in record.methods if (point := record.untuned(each.method))]
    if len(points) < 2:
        return ""
    shown = (f"{point.method} {point.loss:.4f}" if math.isfinite(point.loss) else f"{point.method} broke off"
             for point in points)  # fmt: skip
    return f"at train.lr={text.number(record.lr)} for all, one seed, on the tuning rows: {', '.join(shown)}"


def rates(record: ComparisonRecord) -> "Figure":
    points = [point for point in record.points if point.grid]
    losses = [point.loss for point in points if math.isfinite(point.loss)]
    # If the base model is far worse and were in the picture, all other losses would lie on one line.
    spread = max(losses) - min(losses) if losses else 0.0
    far = math.isfinite(record.base_tuning) and spread > 0 and record.base_tuning > max(losses) + 3 * spread
    above = f"; base model: {record.base_tuning:.3f}, above the picture" if far else ""
    figure, axes = figures.new(
        "Learning rate and loss",
        f"tuning rows, seed {record.tuning_seed}; ring: the tuned point; x: broke off, or above the picture{above}",
        width=12.0,
        height=4.8,
    )
    if not losses:
        figures.say(axes, figures.NOTHING)
        return figure
    low, top = min(losses), max(losses) if far else _top(record.base_tuning, losses)
    for number, method in enumerate(record.methods):
        colour, own = _colour(number), [point for point in points if point.method == method.method]
        for index, alpha in enumerate(dict.fromkeys(point.alpha for point in own)):
            grid = sorted((point for point in own if point.alpha == alpha), key=lambda point: point.lr)
            inside = [(point.lr, point.loss) for point in grid if point.loss <= top]
            outside = [point.lr for point in grid if not point.loss <= top]
            label = f"{method.method}, alpha {alpha:g}"
            look: dict[str, Any] = {"color": colour, "linestyle": ("-", "--", ":")[index % 3], "marker": "o"}
            axes.plot([lr for lr, _ in inside], [loss for _, loss in inside], label=label, **look)
            axes.plot(outside, [top] * len(outside), "x", color=colour, markersize=8, markeredgewidth=2)
        if method.tuned is not None:
            axes.plot(method.tuned.cell.lr, method.tuned.loss, "o", markersize=14, markerfacecolor="none",
                      markeredgecolor=figures.BEST, markeredgewidth=2)  # fmt: skip
    axes.set_xscale("log")
    ticks = sorted({point.lr for point in points})
    shown = ticks[:: -(-len(ticks) // 12)]
    axes.set_xticks(shown, [text.number(rate) for rate in shown])
    axes.minorticks_off()
    axes.set_ylim(low - 0.06 * (top - low or 1), top + 0.04 * (top - low or 1))
    _finish(axes, record.base_tuning, top, "train.lr")
    return figure


def _top(base: float, losses: Sequence[float]) -> float:
    # The picture ends at the base model, or a little above: diverged trainings would flatten all other lines.
    low, high = min(losses), max(losses)
    if not math.isfinite(base) or base <= low:
        return high
    return max(base, min(high, base + 0.15 * (base - low)))


def curves(record: ComparisonRecord) -> "Figure":
    """Draw the held-out loss over the steps at the tuned learning rates: mean and range over the seeds."""
    caption = f"test rows; line: mean over {len(record.seeds)} seeds, band: their range"
    figure, axes = figures.new("Learning curves", caption)
    last: list[float] = []
    for number, method in enumerate(record.methods):
        finished = [each.curve for each in method.trainings if math.isfinite(each.loss)]
        steps = sorted(set.intersection(*({step for step, _ in curve} for curve in finished)) if finished else ())
        if not steps:
            continue
        values = [[dict(curve)[step] for curve in finished] for step in steps]
        means = [sum(each) / len(each) for each in values]
        axes.plot(steps, means, color=_colour(number), linewidth=2, label=method.method)
        axes.fill_between(steps, [*map(min, values)], [*map(max, values)], color=_colour(number), alpha=0.18)
        last += means[1:] or means
    if last:
        _finish(axes, record.base_test, _top(record.base_test, last), "step")
    else:
        figures.say(axes, figures.NOTHING)
    return figure


def forest(record: ComparisonRecord) -> "Figure":
    """Draw the difference of each method to the baseline with its adjusted interval."""
    caption = f"nats per token; {record.level:.0%} intervals that hold together; band: too small to matter"
    figure, axes = figures.new(f"Difference to {BASELINE}", caption)
    measured = [(each.method, each.against) for each in reversed(record.others()) if each.against]
    if not measured:
        figures.say(axes, "no difference was measured")
        return figure
    axes.axvspan(-record.relevant, record.relevant, color=figures.GRID, zorder=0)
    axes.axvline(0, color=figures.MUTED, linewidth=1)
    for height, (_, against) in enumerate(measured):
        colour = figures.BEST if against.p_holm < ERROR else figures.GOOD
        axes.plot([against.adjusted.low, against.adjusted.high], [height, height], color=colour, linewidth=2.4)
        axes.plot(against.mean, height, "o", color=colour, markersize=8)
    ends = [abs(end) for _, each in measured for end in (each.adjusted.low, each.adjusted.high) if math.isfinite(end)]
    reach = 1.12 * max([record.relevant, *ends])
    axes.set_yticks(range(len(measured)), [method for method, _ in measured])
    axes.set(ylim=(-0.6, len(measured) - 0.4), xlim=(-reach, reach))
    axes.set_xlabel(f"loss minus {BASELINE}'s  (left of the band: better than {BASELINE} by what matters)")
    return figure


def _finish(axes: "Axes", base: float, top: float, x: str) -> None:
    if math.isfinite(base) and base <= top:
        axes.axhline(base, color=figures.MUTED, linestyle="--", label="base model")
    axes.set(xlabel=x, ylabel="loss per token")
    axes.grid(axis="y")
    figures.legend(axes)


def _colour(number: int) -> str:
    return figures.COLOURS[number % len(figures.COLOURS)]


FIGURES = {
    "learning_rates": (rates, "Loss on the tuning rows against the learning rate, a line for each method", True),
    "curves": (curves, "Held-out loss over the steps at the tuned learning rates", False),
    "differences": (forest, f"Differences to {BASELINE} with their intervals", False),
}
"""File name -> (drawing function, text for screen readers, True if as wide as the page), in page order."""


def write(record: ComparisonRecord, folder: str) -> list[str]:
    """Write report.html, comparison.json and the figures into `folder`, a path or URI; return the written files."""
    pictures = figures.render({name: partial(draw, record) for name, (draw, *_) in FIGURES.items()})
    return page.files(folder, pictures, {"comparison.json": record.to_json(), "report.html": html(record, pictures)})


def html(record: ComparisonRecord, pictures: dict[str, bytes]) -> str:
    """Return the page; `pictures` are PNGs by the names of FIGURES."""
    shown = "\n".join(page.image(png, *FIGURES[name][1:]) for name, png in pictures.items())
    verdicts = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences(record))
    further = [*((f"score {line.partition(':')[0]}", line.partition(": ")[2]) for line in scores(record))]
    further += [("untuned", line) for line in [untuned(record)] if line]
    further += [("note", note) for note in record.notes]
    aside = f'<div class="card">{page.terms(further)}</div>' if further else ""
    return page.document(
        f"{record.name}: comparison",
        f'<h1>{escape(record.name)}</h1>\n<p class="about">{escape(about(record))}</p>\n'
        f'<div class="card best">{verdicts}</div>\n{aside}\n<h2>Methods</h2>\n{_methods(record)}\n'
        f'<h2>Figures</h2>\n<div class="figures">\n{shown}\n</div>\n<h2>Tuning</h2>\n{_points(record)}\n'
        "<footer>Click a column's name to sort the first table, or point at it to see its meaning. comparison.json has"
        " all numbers, also for each seed.</footer>",
    )


def _methods(record: ComparisonRecord) -> str:
    heads = [page.head(name, column > 0, means) for column, (name, means) in enumerate(zip(HEAD, MEANS, strict=True))]
    rows = [
        "".join(page.cell(shown, kind="number" if column else "") for column, shown in enumerate(cells(record, each)))
        for each in record.methods
    ]
    return page.table(heads, [f"<tr>{row}</tr>" for row in rows])


def _points(record: ComparisonRecord) -> str:
    heads = [f'<th scope="col">{name}</th>' for name in ("method", "alpha", "train.lr", "loss on the tuning rows", "")]
    rows = [f"<tr>{''.join(map(page.cell, _point(record, point)))}</tr>" for point in record.points]
    return page.table(heads, rows)


def _point(record: ComparisonRecord, point: Point) -> list[str]:
    tuned = record.of(point.method).tuned
    chosen = tuned and (tuned.cell.alpha, tuned.cell.lr) == (point.alpha, point.lr)
    word = "tuned" if chosen else "" if point.grid else "untuned"
    loss = f"{point.loss:.4f}" if point.loss < float("inf") else "broke off"
    if record.base_tuning < point.loss < float("inf"):
        word = "above the base model"
    return [point.method, f"{point.alpha:g}", text.number(point.lr), loss, word]
