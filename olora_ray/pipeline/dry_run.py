"""The dry run: print the plan of a run in one screen, or the error with which the run would stop.

It starts neither Ray nor an MLflow run, and writes no file except a converted model. Its errors are those of the run.
"""

import itertools
import logging
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

from olora_ray.cluster import address, preflight
from olora_ray.cluster.decide import Decided, decide
from olora_ray.cluster.preflight import ClusterFacts
from olora_ray.common.text import aligned, duration, window
from olora_ray.config.decided import DataConfig
from olora_ray.config.load import dump
from olora_ray.config.schema import Config
from olora_ray.config.section import Source, is_auto
from olora_ray.model.source import BaseModel
from olora_ray.pipeline import prepare, report
from olora_ray.pipeline.base import open_base
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.tokens.preview import Example, Preview, describe_splits
from olora_ray.tracking.start import resolve_uri
from olora_ray.train import estimate
from olora_ray.train.loader import total_steps

logger = logging.getLogger(__name__)


def dry_run(
    config: Config, show_config: bool = False, found: Mapping[str, Source] | None = None
) -> None:
    """Print the plan of a run, with `show_config` after the complete config; raise UserError as the run would.

    `found` is the result of `detect.check_data`.
    """
    state = RunFolder(config.folder()).check(config)
    done = state.finished(config)
    if done:
        report.already_finished(config, state, done)
    resolve_uri(config)  # checks the address, but does not connect
    base = open_base(config)
    prepare.check_settings(config)
    data = prepare.read_data(config, base, state.kept, found)
    here = ClusterFacts.here(config.cluster)
    decided = decide(config, data, base.model, here, state.kept)
    prepare.plan(decided, base.model)
    prepare.tell(decided, assumed=" (assuming this machine)")
    logger.info("reading rows")
    train, held_out = describe_splits(data.config, base.spec)
    if show_config:
        print(dump(data.config))
    table = [
        ("targets", layers(decided.size.targets)),
        *_data(data.config, train, held_out),
        ("training", prepare.length(decided.config, train.packs, about=not train.exact)),
        *_measured(decided, base.model, train, held_out),
    ]
    print("\n".join(aligned(table)))
    print("\nexamples, with the supervised tokens in [[ ]]")
    for example in train.examples:
        print(
            f"\n{_short(example.origin)}: {len(example.input_ids):,} tokens, {int(example.mask.sum()):,} supervised"
        )
        rejected = example.rejected()
        if rejected:
            print("  prompt and chosen answer:")
        print(_shown(base.tokenizer, example.right()))
        if rejected:
            print("  rejected answer:")
            print(_shown(base.tokenizer, rejected))
    if not address.elsewhere():
        preflight.refuse_here(decided.config, base.model, decided.size, decided.expected, here)


def layers(targets: Mapping[str, tuple[int, ...]]) -> str:
    """Return the adapted layers as `30 x 7 layers: q_proj 576 x 576, ...`, grouped by name without numbers."""
    groups: Counter[tuple[tuple[str, ...], tuple[int, ...]]] = Counter()
    for name, shape in targets.items():
        words = tuple(part for part in name.split(".") if not part.isdecimal())
        groups[words, shape] += 1
    lasts = Counter(words[-1] for words, _ in groups)
    by_count: dict[int, list[str]] = {}
    for (words, shape), count in groups.items():
        label = words[-1] if lasts[words[-1]] == 1 else ".".join(words[-2:])
        by_count.setdefault(count, []).append(f"{label} {' x '.join(map(str, shape))}")
    return "; ".join(
        f"{count} x {len(labels)} layers: {', '.join(labels)}" for count, labels in by_count.items()
    )


def _data(
    config: DataConfig, train: Preview, held_out: Preview | None
) -> Iterator[tuple[str, str]]:
    sources = list(train.sources)
    # With data.eval_fraction the held-out rows come from the training sources, which are listed already.
    if held_out and not held_out.limits.part:
        sources += held_out.sources
    for each in sources[:6]:
        share = f", weight {each.source.weight:g}" if each.source.weight != 1 else ""
        noun = "row" if each.rows == 1 else "rows"
        text = (
            f"{_short(each.source.path)} ({each.source.format}{share}): {each.rows:,} {noun} read"
        )
        if each.rejected:
            text += f", {each.rejected:,} rejected"
        yield each.setting, text
    rest = [each.rows for each in sources[6:]]
    if rest:
        yield f"and {len(rest)} more", f"{sum(rest):,} rows read"
    yield "rows", _rows(train)
    if held_out is None:
        yield "held out", "none (set data.eval or data.eval_fraction)"
    else:
        yield "held out", f"{_rows(held_out)}; {held_out.packs:,} sequences"
    about = "" if train.exact else "about "
    yield (
        "sequences",
        f"{about}{train.packs:,} of at most {config.data.max_length:,} tokens, fill {train.fill:.2f}",
    )
    yield (
        "tokens",
        f"{about}{train.tokens:,} per epoch, {train.supervised / train.tokens:.0%} of them supervised",
    )
    if train.pairs:
        prompt, chosen, rejected = train.pairs.sizes
        in_each = train.pairs.count / train.packs
        yield (
            "pairs",
            f"{about}{train.pairs.count:,}, {in_each:.1f} per sequence; prompt {prompt:,}, chosen {chosen:,},"
            f" rejected {rejected:,} tokens (medians)",
        )
    low, half, most, nearly, high = (f"{length:,}" for length in train.lengths)
    yield (
        "example length",
        f"{low} to {high} tokens; 50% have up to {half}, 90% up to {most}, 99% up to {nearly}",
    )


def _rows(preview: Preview) -> str:
    text = f"{preview.rows:,}"
    if not preview.exact:
        text = f"about {text} ({preview.read:,} of them read)"
    if preview.note:
        text += f" ({preview.note})"
    rejected = sum(preview.rejected.values())
    if not rejected:
        return f"{text}, none rejected"
    limits = preview.limits
    text = f"{text}, {rejected:,} rejected ({preview.rejections()}"
    if limits.part:
        return f"{text})"
    rows = preview.judged.rows
    allowed = f"data.max_rejected = {limits.share:g} allows {int(limits.allowed(rows)):,}"
    if rows > preview.read:
        allowed += " with the held-out rows"
    return f"{text}; {allowed})"


def _measured(
    decided: Decided, base: BaseModel, train: Preview, held_out: Preview | None
) -> Iterator[tuple[str, str]]:
    config = decided.config
    why = estimate.not_measured(config, decided.size, address.elsewhere())
    if why:
        yield "time", f"not estimated: {why}"
        return
    logger.info("training on one micro-batch to estimate the time")
    workers = config.cluster.most
    width = min(config.train.micro_batch, config.train.global_batch)
    packs = [train.some_packs[number % len(train.some_packs)] for number in range(width)]
    steps = total_steps(config.train, train.packs)
    once, rate = estimate.micro_batch(config, base, packs, steps)
    if rate is not None and is_auto(config.train.lr):
        yield "learning rate", f"about {rate * config.train.lr_factor:.2g} (train.lr=auto)"
    step = once * config.accumulation()
    seconds = steps * step
    words = f"{steps} steps of about {step:.2g} s"
    if held_out is not None:
        # An evaluation runs only the forward pass, a third of the work of a training step.
        rounds = -(-steps // config.train.eval_every) + 1
        seconds += rounds * -(-held_out.packs // (config.train.micro_batch * workers)) * once / 3
        words += f" and {rounds} evaluations"
    words = f"about {duration(seconds)} for {words} (measured on one micro-batch here)"
    yield "time", f"{words}, plus start, answers and export"


def _shown(tokenizer: Any, example: Example) -> str:
    text = ""
    tokens = zip(example.input_ids.tolist(), example.mask.tolist(), strict=True)
    for supervised, pairs in itertools.groupby(tokens, key=itemgetter(1)):
        part = str(tokenizer.decode([token for token, _ in pairs]))
        part = _shortened(part.replace("\n", "\\n"), 360)
        text += f"[[{part}]]" if supervised else part
    width = (window() or 120) - 4
    return textwrap.indent(textwrap.fill(_shortened(text, 900), width), "    ")


def _shortened(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    return f"{text[: most * 2 // 3]} ... {text[-most // 3 :]}"


def _short(path: str) -> str:
    return path.removeprefix(f"{Path.cwd()}/")
