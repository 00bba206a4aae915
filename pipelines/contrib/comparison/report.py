"""The report of a comparison: its verdict in sentences, a table, figures, one self-contained page, and MLflow.

No difference is named without its interval, and without the rows, seeds and model that it was measured on.
"""

import itertools
import logging
import math
from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

from comparison.arguments import FEW_SEEDS
from comparison.record import Against, ArmRecord, ComparisonRecord
from comparison.run import seeds_line
from olora_ray.common import node_cache, page, storage
from olora_ray.common.text import aligned, duration, plural
from olora_ray.config.load import dump
from olora_ray.config.schema import Config
from olora_ray.sweep.report import figures, text
from olora_ray.sweep.report.page import files
from olora_ray.tracking.run import Tracker

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("olora_ray.comparison")

BEST = "best.yaml"
MEANS = {
    "arm": "its name on the command line",
    "learning rate": "tuned peak rate; * means that the best rate is at the end of the grid",
    "x rate": "this rate divided by the arm's automatic rate (or by the train.lr that the arm sets)",
    "loss": "test loss after the last step, per supervised token: mean over seeds and rows, ± half of its 95% interval",
    "difference": "this loss minus the baseline's, on the same rows with the same seeds; below 0: the arm is better",
    "interval": "the true difference lies in this range, with 95% confidence for all arms together",
    "after 25%": "mean test loss after a quarter of the steps",
    "after 50%": "mean test loss after half of the steps",
    "forgets": "mean rise of the loss on 80 other texts since the start; below 0: it fell",
    "init": "time of the initialisation in one process",
    "tuning": "trainings of the tuning and their time; those that broke off or ended above the base model",
    "trainable": "trained parameters, in millions, counted in an adapter",
}
"""Column of the table -> its meaning."""
HOW_TO_READ = (
    "Each arm (a method, or settings) was first trained at several learning rates, by the same factors around its"
    " automatic rate. Its best rate was worked out on rows of their own; it may lie between two that were tried. Then"
    " each was trained again at that rate with new seeds, and measured on other rows. Loss is the average surprise per"
    " token: lower is better. Other seeds or rows give another difference; the true one lies in the interval, with"
    " 95% confidence. If the interval contains 0, a lower loss may be luck. If all of it is within the smallest"
    " difference that matters, the arms are equal for practical purposes."
)


def conclude(record: ComparisonRecord, best: Config | None, folder: str, tracker: Tracker) -> None:
    """Write page, figures, comparison.json and best.yaml, log them to MLflow, and log the verdict."""
    files = write(record, folder)
    if best is not None:
        files.append(storage.join(folder, BEST))
        storage.write_text(files[-1], dump(best))
    for file in files:
        with node_cache.fetched(file) as local:
            tracker.artifact(local)
    tracker.table("arms", list(MEANS), [cells(record, each) for each in record.arms])
    tracker.metrics({0: metrics(record)})
    tracker.tags({f"olora.verdict.{each.name}": sentence(record, each) for each in record.others()})
    for line in lines(record):
        logger.info(line)
    logger.info(f"report: {storage.join(folder, 'report.html')}")
    if command := next_command(record, folder):
        logger.info(command)


def metrics(record: ComparisonRecord) -> dict[str, float]:
    """Return numbers for MLflow: loss/ARM, difference/ARM and the bounds of its adjusted interval."""
    numbers = {f"loss/{each.name}": each.loss for each in record.arms if each.loss is not None}
    for arm in record.others():
        if difference := arm.against:
            numbers[f"difference/{arm.name}"] = difference.mean
            numbers[f"difference_low/{arm.name}"] = difference.adjusted.low
            numbers[f"difference_high/{arm.name}"] = difference.adjusted.high
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def sentences(record: ComparisonRecord) -> list[str]:
    return [sentence(record, each) for each in record.others()]


def sentence(record: ComparisonRecord, arm: ArmRecord) -> str:
    """Return the verdict on an arm, with the rows, seeds and model that it holds for."""
    if (difference := arm.against) is None:
        return (
            f"{arm.name} beside {record.baseline}: not compared, because {_why_not(record, arm)}."
        )
    low, high, others = difference.adjusted.low, difference.adjusted.high, len(record.arms) - 1
    together = f" for {others} comparisons together" if others > 1 else ""
    rows = f"{record.rows['test']} test rows"
    if record.groups != record.rows["test"]:
        rows = f"{record.groups} groups of {rows}"
    return (
        f"{arm.name} beside {record.baseline}: {conclusion(difference, record.relevant)}. Difference of the losses:"
        f" {difference.mean:+.4f} nats per token ({record.level:.0%} interval {low:+.4f} .. {high:+.4f}{together})."
        f" Measured with {plural(len(record.seeds), 'seed')} x {rows} of {record.task} with {record.model}, each at the"
        f" learning rate that was best on {record.rows['tuning']} other rows.{_reservations(record, arm)}"
    )


def verdict(record: ComparisonRecord) -> str:
    """Return the result of each arm, without what it was measured with."""
    found = []
    for arm in record.others():
        said = "not compared"
        if arm.against is not None:
            said = conclusion(arm.against, record.relevant)
        found.append(f"{arm.name} beside {record.baseline}: {said}")
    return ". ".join(found)


def conclusion(difference: Against, relevant: float) -> str:
    """Return the result in words; but for the word for an undecided one it follows from the interval alone."""
    low, high, bound = difference.adjusted.low, difference.adjusted.high, f"{relevant:g}"
    word = "lower" if difference.mean < 0 else "higher"
    if -relevant < low and high < relevant:
        which = "" if low <= 0.0 <= high else f"; its loss is {word}, but by less than that"
        return f"equal for practical purposes, because less than {bound} (compare.relevant) does not matter{which}"
    if low <= 0.0 <= high:
        return f"undecided: its loss was {word}, but this may be luck; use more seeds or test rows"
    if high <= -relevant or low >= relevant:
        verdict = "better" if word == "lower" else "worse"
        return f"{verdict}: its loss is {word} by at least {bound} (compare.relevant), so the difference matters"
    return f"its loss is {word}, but perhaps by less than {bound} (compare.relevant), which would not matter"


def _why_not(record: ComparisonRecord, arm: ArmRecord) -> str:
    for each in (record.of(record.baseline), arm):
        if each.tuned is None:
            return f"every tuning trial of {each.name} broke off"
        if broken := each.broke_off():
            return f"{plural(broken, 'training')} of {len(each.trainings)} of {each.name} broke off"
    return "nothing was measured"


def _reservations(record: ComparisonRecord, arm: ArmRecord) -> str:
    reservations = []
    for each in (record.of(record.baseline), arm):
        if each.tuned is not None and not each.tuned.inside:
            reservations.append(
                f"the best learning rate of {each.name} is at the end of the grid; widen compare.rates"
            )
        if (
            each.loss is not None
            and math.isfinite(record.base_test)
            and each.loss > record.base_test
        ):
            reservations.append(f"{each.name} ends with a higher loss than the base model")
    if len(record.seeds) < FEW_SEEDS:
        reservations.append(f"{len(record.seeds)} seeds are few, use {FEW_SEEDS} or more")
    return f" But {'; '.join(reservations)}." if reservations else ""


def cells(record: ComparisonRecord, arm: ArmRecord) -> list[str]:
    tuned, against, broken = arm.tuned, arm.against, arm.broke_off()
    diverged = f", {tuned.diverged} diverged" if tuned and tuned.diverged else ""
    loss = f"{broken} of {len(arm.trainings)} broke off" if broken else ""
    return [
        arm.name,
        f"{text.number(arm.lr, 2) if arm.lr else 'auto'}{'' if tuned.inside else '*'}"
        if tuned
        else "none",
        f"{tuned.factor:g}" if tuned else "",
        loss if arm.loss is None else f"{arm.loss:.4f} ± {arm.half:.4f}",
        f"{against.mean:+.4f}" if against else "",
        f"{against.adjusted.low:+.4f} .. {against.adjusted.high:+.4f}" if against else "",
        *([f"{each:.4f}" for each in arm.course()[:2]] or ["", ""]),
        "" if arm.forgotten is None else f"{arm.forgotten:+.4f}",
        f"{arm.init_seconds:.1f} s",
        f"{arm.tunings} in {duration(arm.tuning_seconds)}{diverged}" if tuned else "all broke off",
        f"{arm.trainable / 1e6:.2f} M" if arm.trainable else "",
    ]


def lines(record: ComparisonRecord) -> list[str]:
    """Return table, scores and verdicts for the log."""
    rows = [list(MEANS), *(cells(record, each) for each in record.arms)]
    return [
        *aligned(rows, [False, *[True] * (len(MEANS) - 1)]),
        f"of: {about(record)}",
        *(f"scores: {line}" for line in scores(record)),
        *(f"seeds: {line}" for line in seeds(record)),
        *(f"verdict: {sentence}" for sentence in sentences(record)),
    ]


def about(record: ComparisonRecord) -> str:
    rows = ", ".join(f"{count:,} {name}" for name, count in record.rows.items())
    return (
        f"{record.model} on {record.task}; rows {rows}; {plural(record.steps, 'step')} of {record.global_batch}"
        f" sequences; tuned with seed {record.tuning_seed}, compared with seeds {record.seeds[0]} .."
        f" {record.seeds[-1]}; base model {record.base_test:.4f} on the test rows;"
        f" {record.machine}, {duration(record.seconds)}"
    )


def scores(record: ComparisonRecord) -> list[str]:
    found: dict[str, dict[str, list[float]]] = {}
    for arm in record.arms:
        for name, value in (pair for each in arm.trainings for pair in each.scores.items()):
            found.setdefault(name, {}).setdefault(arm.name, []).append(value)
    return [
        f"{name}: {', '.join(f'{arm} {fmean(values):.3f}' for arm, values in by_arm.items())}"
        for name, by_arm in found.items()
    ]


def seeds(record: ComparisonRecord) -> list[str]:
    asked = len(record.seeds), len(record.others()), record.relevant
    return [
        seeds_line(f"the difference of {each.name} varies by", each.against.spread, *asked)
        + "; the same command with more --seeds trains only those that are missing"
        for each in record.others()
        if each.against
    ]


def next_command(record: ComparisonRecord, folder: str) -> str | None:
    """Return how to train the arm with the lowest loss; None without one."""
    if (best := record.best()) is None or best.tuned is None:
        return None
    return f"to train the arm with the lowest loss, {best.name}: olora-ray finetune {storage.join(folder, BEST)}"


def rates(record: ComparisonRecord) -> "Figure":
    points = [(each.arm, each.lr, each.loss) for each in record.points if each.lr]
    losses, base = [loss for *_, loss in points if math.isfinite(loss)], record.base_tuning
    top = _top(base, losses)
    above = (
        f"; base model: {base:.3f}, above the picture" if losses and top < base < math.inf else ""
    )
    caption = f"tuning rows, seed {record.tuning_seed}; dotted: the tuned rate; x: broke off, or above the picture"
    figure, axes = figures.new("Learning rate and loss", caption + above)
    if not losses:
        figures.say(axes, figures.NOTHING)
        return figure
    for arm, colour in zip(record.arms, itertools.cycle(figures.COLOURS), strict=False):
        own = sorted((lr, loss) for name, lr, loss in points if name == arm.name)
        shown, over = (
            [pair for pair in own if pair[1] <= top],
            [lr for lr, loss in own if not loss <= top],
        )
        axes.plot(
            [lr for lr, _ in shown], [loss for _, loss in shown], "o-", color=colour, label=arm.name
        )
        axes.plot(over, [top] * len(over), "x", color=colour, markersize=8, markeredgewidth=2)
        if arm.lr is not None:
            axes.axvline(arm.lr, color=colour, linestyle=":", linewidth=1.2)
    ticks = sorted({lr for _, lr, _ in points})
    ticks = ticks[:: -(-len(ticks) // 12)]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [text.number(rate, 2) for rate in ticks])
    axes.minorticks_off()
    space = top - min(losses) or 1
    axes.set_ylim(min(losses) - 0.06 * space, top + 0.04 * space)
    if math.isfinite(base) and base <= top:
        axes.axhline(base, color=figures.MUTED, linestyle="--", label="base model")
    axes.set(xlabel="peak learning rate", ylabel="loss per token")
    axes.grid(axis="y")
    figures.legend(axes)
    return figure


def _top(base: float, losses: Sequence[float]) -> float:
    low, high = min(losses, default=0.0), max(losses, default=0.0)
    # If the base model is far worse and were in the picture, all other losses would lie on one line.
    if not math.isfinite(base) or base <= low or (high > low and base > high + 3 * (high - low)):
        return high
    # The picture ends at the base model, or a little above: diverged trainings would flatten all other lines.
    return max(base, min(high, base + 0.15 * (base - low)))


def forest(record: ComparisonRecord) -> "Figure":
    """Draw the difference of each arm to the baseline with its adjusted interval."""
    together = " for all arms together" if len(record.others()) > 1 else ""
    caption = f"nats per token; {record.level:.0%} intervals{together}; band: too small to matter"
    figure, axes = figures.new(f"Difference to {record.baseline}", caption)
    measured = [(each.name, each.against) for each in reversed(record.others()) if each.against]
    if not measured:
        figures.say(axes, "no difference was measured")
        return figure
    axes.axvspan(-record.relevant, record.relevant, color=figures.GRID, zorder=0)
    axes.axvline(0, color=figures.MUTED, linewidth=1)
    reach = record.relevant
    colours = {
        each.name: colour
        for each, colour in zip(record.arms, itertools.cycle(figures.COLOURS), strict=False)
    }
    for height, (name, against) in enumerate(measured):
        ends, colour = (against.adjusted.low, against.adjusted.high), colours[name]
        axes.plot(ends, [height, height], color=colour, linewidth=2.4)
        axes.plot(against.mean, height, "o", color=colour, markersize=8)
        reach = max([reach, *(abs(end) for end in ends if math.isfinite(end))])
    axes.set_yticks(range(len(measured)), [name for name, _ in measured])
    axes.set(ylim=(-0.6, len(measured) - 0.4), xlim=(-1.12 * reach, 1.12 * reach))
    axes.set_xlabel(
        f"loss minus {record.baseline}'s  (better if all of the line is left of the band)"
    )
    return figure


FIGURES = {
    "learning_rates": (
        rates,
        "Loss on the tuning rows against the learning rate, a line for each arm",
    ),
    "differences": (forest, "Differences to the baseline with their intervals"),
}
"""File name -> (drawing function, text for screen readers), in page order."""


def write(record: ComparisonRecord, folder: str) -> list[str]:
    """Write report.html, comparison.json and the figures into `folder`, a path or URI; return the written files."""
    pictures = figures.render({name: partial(draw, record) for name, (draw, _) in FIGURES.items()})
    return files(
        folder,
        pictures,
        {"comparison.json": record.to_json(), "report.html": html(record, pictures, folder)},
    )


def html(record: ComparisonRecord, pictures: dict[str, bytes], folder: str) -> str:
    """Return the page; `pictures` are PNGs by the names of FIGURES, `folder` is the comparison's."""
    facts = [("next", line)] if (line := next_command(record, folder)) else []
    facts += [("result", line) for line in sentences(record)]
    facts += [("how to read this", HOW_TO_READ), *(("score", line) for line in scores(record))]
    facts += [
        *(("seeds", line) for line in seeds(record)),
        *(("note", note) for note in record.notes),
    ]
    return page.rendered(
        "report.html",
        title=f"{record.name}: comparison",
        verdict=verdict(record),
        name=record.name,
        about=about(record),
        facts=facts,
        figures=[(FIGURES[name][1], png) for name, png in pictures.items()],
        rows_title="Arms",
        heads=[(name, "number", means) for name, means in MEANS.items()],
        rows=[cells(record, each) for each in record.arms],
        legend=MEANS.items(),
        footer="comparison.json has all numbers, for each seed too.",
    )
