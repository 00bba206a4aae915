"""The table of a comparison, for the terminal and the page."""

import math

from olora_ray.common.text import aligned, duration, plural
from olora_ray.sweep.compare import verdict
from olora_ray.sweep.compare.grid import BASELINE
from olora_ray.sweep.compare.record import ComparisonRecord, MethodRecord
from olora_ray.sweep.report import text

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
    "learning rate with the lowest loss on the tuning rows; * at the end of the grid",
    "adapter.alpha",
    "loss per supervised token after the last step, mean over seeds and test rows, with half of its 95% interval",
    "difference of the losses in nats per supervised token, on the same rows with the same seeds",
    "of that difference; those of all methods hold together with 95% (Bonferroni)",
    "p value of no difference, adjusted for the number of comparisons (Holm)",
    f"steps until the lowest test loss so far is {BASELINE}'s last of the same seed: the median, of an even"
    " number of seeds the later of the middle two; > if not reached",
    f"the same, divided by {BASELINE}'s: median (lowest .. highest) over seeds",
    "seconds of the initialisation and of these steps, in that training",
    "seconds of the initialisation in one process",
    "megabytes of the factors, which workers exchange",
    "numbers that are trained, in millions",
    "trials; those that broke off or ended above the base model; largest / smallest rate as good as the best",
)
"""What each column has."""


def cells(record: ComparisonRecord, method: MethodRecord) -> list[str]:
    """A method's row."""
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
    """The table for a terminal."""
    rows = [list(HEAD), *(cells(record, each) for each in record.methods)]
    return aligned(rows, [False, *[True] * (len(HEAD) - 1)])


def summary(record: ComparisonRecord) -> list[str]:
    """What it was of, the scores and the untuned points, and the verdict: a line each."""
    return [
        f"of: {about(record)}",
        *(f"scores: {line}" for line in scores(record)),
        *(f"untuned: {line}" for line in [untuned(record)] if line),
        *(f"verdict: {sentence}" for sentence in verdict.sentences(record)),
    ]


def about(record: ComparisonRecord) -> str:
    """Everything that the numbers are of."""
    rows = ", ".join(f"{count:,} {kind}" for kind, count in record.rows.items())
    return (
        f"{record.model} on {record.task}; rows {rows}; {plural(record.steps, 'step')} of {record.global_batch}"
        f" sequences, rank {record.rank}; tuned with seed {record.tuning_seed}, compared with seeds"
        f" {record.seeds[0]} .. {record.seeds[-1]}; base model {record.base_test:.4f} on the test rows;"
        f" {record.machine}, {duration(record.seconds)}"
    )


def scores(record: ComparisonRecord) -> list[str]:
    """The mean scores of each method; descriptive, and of the best adapter of each training."""
    found = {each.method: each.scores() for each in record.methods}
    names = dict.fromkeys(name for of_method in found.values() for name in of_method)
    return [
        f"{name}: {', '.join(f'{method} {each[name]:.3f}' for method, each in found.items() if name in each)}"
        for name in names
    ]


def untuned(record: ComparisonRecord) -> str:
    """What a comparison at the config's own learning rate would have shown."""
    points = [point for each in record.methods if (point := record.untuned(each.method))]
    if len(points) < 2:
        return ""
    shown = (f"{point.method} {point.loss:.4f}" if math.isfinite(point.loss) else f"{point.method} broke off"
             for point in points)  # fmt: skip
    return f"at train.lr={text.number(record.lr)} for all, one seed, on the tuning rows: {', '.join(shown)}"
