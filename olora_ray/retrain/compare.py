"""Comparison of challenger and champions, as they are in the registry, on the held-out rows and on the guard's."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from olora_ray.cluster import connection, preflight
from olora_ray.cluster.decide import decide_evaluation
from olora_ray.cluster.failures import user_errors
from olora_ray.cluster.preflight import ClusterFacts
from olora_ray.common import node_cache, records, storage
from olora_ray.common.errors import UserError
from olora_ray.common.storage import digest, digest_json
from olora_ray.common.text import plural
from olora_ray.config.decided import DataConfig
from olora_ray.config.load import override, with_model
from olora_ray.config.schema import NO_GATE, AnyConfig, Config
from olora_ray.config.section import Source
from olora_ray.evaluation import lm_eval_tasks, targets
from olora_ray.evaluation.groups import group_names
from olora_ray.evaluation.held_out import computed_by, measure
from olora_ray.evaluation.lm_eval_tasks import Tasks, load_tasks
from olora_ray.evaluation.rows import LOSS, RowResults, lower_is_better
from olora_ray.model.folder import CONFIG
from olora_ray.model.source import BaseModel
from olora_ray.pipeline.base import Base, find_model, with_tokenizer
from olora_ray.pipeline.run_folder import Fingerprint, RunFolder
from olora_ray.retrain import gate, recipe
from olora_ray.retrain.gate import Decision, HeldOut
from olora_ray.retrain.recipe import Inputs
from olora_ray.tokens.prepare import plan_here, prepare
from olora_ray.tracking import models
from olora_ray.tracking.aliases import Aliases
from olora_ray.tracking.checksums import AGAINST, Version
from olora_ray.tracking.old_versions import ANCHOR, GUARD
from olora_ray.tracking.start import resolve_uri
from olora_ray.train import scoring
from olora_ray.train.objectives.objective import objective_of

logger = logging.getLogger(__name__)


YEAR = 365 * 86400.0
"""Seconds in which different sets of held-out rows are counted."""
STALE = 90 * 86400.0
"""Seconds after which unchanged held-out rows count as stale."""
ANSWERED = 500
"""Rows of each of lm-eval's tasks in a guard."""
TEXT = Path(__file__).with_name("guard.jsonl")


@dataclass(frozen=True)
class RowSet:
    """Rows on which versions are measured: the held-out rows, or those of the guard."""

    name: str
    config: DataConfig
    """Its data.eval and data.eval_fraction are these rows."""
    digest: str
    tasks: Tasks | None = None
    """lm-eval's tasks, instead of rows."""


@dataclass(frozen=True)
class Candidate(Version):
    """A version with a part of its change, before it is registered."""

    factor: float = 1.0
    """The part of the change."""
    adapter: str = ""
    """Its folder: a plain LoRA for the base model."""


def guard(config: Config, inputs: Inputs) -> RowSet | None:
    """Return the rows of gate.guard; raises UserError if they cannot be read."""
    wanted = config.gate.guard
    if not wanted:
        return None
    plain: dict[str, Any] = {
        "evaluation.scorer": None,
        "gate.group": None,
        "data.eval_fraction": None,
        "data.max_rejected": 1.0,
        **NO_GATE,
    }
    names: list[str] = []
    if wanted == "text":
        plain["data.eval"] = [{"path": str(TEXT), "format": "text"}]
    else:
        names = [each for each in wanted if isinstance(each, str)]
        if not names:
            plain["data.eval"] = [
                each.model_dump(mode="json") for each in wanted if isinstance(each, Source)
            ]
    changed = override(inputs.data, plain)
    if names:
        key = digest_json([names, ANSWERED])
        return RowSet("the guard's tasks", changed, key, load_tasks(names, None))
    try:
        plan = plan_here(changed, inputs.base.spec, "eval")
    except UserError as error:
        raise type(error)(f"gate.guard, read like data.eval: {error}") from None
    return RowSet("the guard rows", changed, plan.digest())


def decision(
    inputs: Inputs,
    guard: RowSet | None,
    challenger: Version,
    champion: Version | None,
    versions: Sequence[Version],
    gone: Sequence[Version] = (),
    looks: int = 1,
) -> Decision:
    """Measure what is not measured yet, and return the gate's decision on the challenger.

    `versions` are all versions of the model, and `gone` those that were pruned. The tags of the decision name the best
    champions for the next one. `looks` as in `gate.decide`.
    """
    config = inputs.config
    there = {version.number: version for version in versions if not version.rolled_back}
    held_out = RowSet("the held-out rows", inputs.data, inputs.fingerprint.held_out)
    best: dict[str, Version] = {}
    wanted = [(challenger, held_out)]
    if champion is not None:
        best = {tag: there.get(champion.tags.get(tag, ""), champion) for tag in (ANCHOR, GUARD)}
        wanted.append((champion, held_out))
        if config.gate.anchor is not None:
            wanted.append((best[ANCHOR], held_out))
    if guard is not None:
        wanted.append((challenger, guard))
        if best:
            wanted.append((best[GUARD], guard))
    try:
        done = measured(inputs, wanted)
    except NotComparable as error:
        return Decision(False, f"{error}; promote the challenger by hand if it is good", {})
    found = {}
    for (version, rows), results in zip(wanted, done, strict=True):
        found[version.number, rows.name] = results

    def of(version: Version | None, rows: RowSet | None = held_out) -> RowResults | None:
        if version is None or rows is None:
            return None
        return found.get((version.number, rows.name))

    ours = of(challenger)
    theirs = of(champion)
    assert ours is not None
    anchor = of(best.get(ANCHOR))
    own = of(challenger, guard)
    best_guard = of(best.get(GUARD), guard)
    uses = uses_of_rows(challenger, champion, [*gone, *versions])
    told = f"held-out rows: used for {plural(uses['versions'], 'version')} since {uses['since']}"
    if champion is not None:
        told += f"; the champion is {plural(uses['champion_days'], 'day')} old"
    if not isinstance(challenger, Candidate):
        logger.info(told)
    about = replace(about_rows(config, inputs, ours, champion), sets=uses["sets"])
    tags = {}
    both = None
    if own is not None:
        tags[GUARD] = _best(LOSS, challenger, own, best.get(GUARD), best_guard)
        if best_guard is not None:
            both = (own, best_guard)
    if config.gate.anchor is not None:
        metric = gate.metric_of(config.gate, ours)
        tags[ANCHOR] = _best(metric, challenger, ours, best.get(ANCHOR), anchor)
    decided = gate.decide(config.gate, ours, theirs, about, anchor, both, looks)
    reason = decided.reason
    if uses["stale"]:
        reason += f"; {uses['stale']}"
    details = {**decided.details, "uses": uses, "lost": lost_rows(inputs, ours, theirs)}
    return replace(decided, reason=reason, details=details, tags=tags)


def _best(
    metric: str,
    challenger: Version,
    ours: RowResults,
    best: Version | None,
    theirs: RowResults | None,
) -> str:
    """Return the version that is the best champion if the challenger is promoted."""
    if best is None or theirs is None:
        return challenger.number
    new = ours.metric(metric)
    old = theirs.metric(metric)
    stays = new >= old if lower_is_better(metric) else new <= old
    if stays:
        return best.number
    return challenger.number


def uses_of_rows(
    challenger: Version, champion: Version | None, versions: Sequence[Version]
) -> dict[str, Any]:
    """Return how often versions were judged on held-out rows: on these rows, and on how many sets within a year."""
    now = challenger.created
    rows = {each.number: Fingerprint.from_tags(each.tags).held_out for each in versions}
    judged = [each for each in versions if each.number == challenger.number or AGAINST in each.tags]
    same = [each.created for each in judged if rows[each.number] == rows.get(challenger.number)]
    sets = {rows[each.number] for each in judged if each.created > now - YEAR}
    since = min(same, default=now)
    day = time.strftime("%Y-%m-%d", time.gmtime(since))
    stale = ""
    if now - since > STALE:
        age = int((now - since) / 86400)
        stale = f"the held-out rows are stale: the same since {day}, so no drift of {age} days shows; add newer ones"
    return {
        "versions": len(same),
        "since": day,
        "sets": max(1, len(sets)),
        "champion_days": None if champion is None else int((now - champion.created) / 86400),
        "stale": stale,
    }


def lost_rows(inputs: Inputs, ours: RowResults, theirs: RowResults | None) -> dict[str, Any]:
    """Return the rows that the champion answered right and the challenger wrong, for each score of 0 or 1."""
    lost: dict[str, Any] = {}
    if theirs is None:
        return lost
    for name, scores in theirs.scores.items():
        answered = ours.scores.get(name, {})
        rows = [row for row, score in scores.items() if score == 1 and answered.get(row) == 0]
        examples = []
        for row in rows[:5]:
            file, position = ours.origins[row]
            examples.append(f"{inputs.held_out.files[file].file.uri}:{position + 1}")
        if rows:
            lost[name] = {"rows": len(rows), "examples": examples}
    return lost


def about_rows(
    config: Config, inputs: Inputs, rows: RowResults, champion: Version | None
) -> HeldOut:
    """Return the groups of the held-out rows, and the rows that the champion was not trained on."""
    groups = group_names(config.gate.group, inputs.held_out, rows.origins)
    if champion is None:
        return HeldOut(groups)
    files = recipe.unseen_rows(config, inputs.held_out, recipe.of_version(config, champion))
    if files is None:
        return HeldOut(groups)
    return HeldOut(groups, [row for row, (file, _) in enumerate(rows.origins) if file in files])


class NotComparable(UserError):
    """The two models do not see the same tokens."""


def measured(inputs: Inputs, wanted: Sequence[tuple[Version, RowSet]]) -> list[RowResults]:
    """Return the results of each version on its rows. Results that an earlier call stored are read again.

    Starts Ray and opens versions only if a result is missing. Raises NotComparable if the tokenizers differ.
    """
    notes = [note_file(rows, version, inputs.base.model.digest) for version, rows in wanted]
    known: dict[str, Compared] = {}
    missing = {}
    for note, pair in zip(notes, wanted, strict=True):
        kept = records.read(note, Compared)
        if kept is None:
            missing[note] = pair
        else:
            known[note] = kept
    tokenizers = [each.tokenizer for each in known.values()]
    _same_tokens(tokenizers)
    if missing:
        with connection.connect(inputs.config) as (_, cluster):
            preflight.require(decide_evaluation(inputs.config, cluster), cluster)
            opened: dict[str, tuple[AnyConfig, Base, str | None]] = {}
            for note, (version, rows) in missing.items():
                if isinstance(version, Candidate):
                    opened[note] = (rows.config, inputs.base, version.adapter)
                else:
                    opened[note] = _opened(rows.config, version)
            _same_tokens([*tokenizers, *(base.spec.digest for _, base, _ in opened.values())])
            for note, (named, own, adapter) in opened.items():
                version, rows = missing[note]
                logger.info(f"measuring version {version.number} on {rows.name}")
                # The answers of both versions end at the same tokens, which the config's base model defines.
                base = replace(inputs.base, model=own.model)
                with user_errors():
                    results = results_on(
                        rows, base, adapter, named, cluster, lambda: inputs.base.model
                    )
                known[note] = Compared(own.spec.digest, results)
                records.write(note, known[note])
    return [known[note].rows for note in notes]


def results_on(
    rows: RowSet,
    base: Base,
    adapter: str | None,
    named: AnyConfig,
    cluster: ClusterFacts,
    base_of_pairs: Callable[[], BaseModel] | None = None,
) -> RowResults:
    config = decide_evaluation(named, cluster, base.spec)
    if rows.tasks is None:
        held_out = prepare(rows.config, base.spec, "eval", tell=False)  # the training has told it
        return measure(base, adapter, held_out, config, base_of_pairs)[0]
    done = lm_eval_tasks.run(rows.tasks, ANSWERED, base.model, adapter, config)
    without = [name for name, task in done.items() if "acc" not in task.values]
    if without:
        raise UserError(
            f"gate.guard: {without[0]} has no accuracy (acc) per row; use another of lm-eval's tasks"
        )
    # The share of wrong answers is a loss: the mean over all rows of all tasks.
    wrong: list[float] = []
    for task in done.values():
        wrong += [1.0 - value for value in task.values["acc"]]
    origins = tuple((0, row) for row in range(len(wrong)))
    return RowResults(rows.digest, (1,) * len(wrong), tuple(wrong), {}, origins)


@dataclass(frozen=True)
class Compared:
    tokenizer: str
    """Digest of the version's tokenizer, so that stored results can be compared without opening the version."""
    rows: RowResults


def _opened(config: Config, version: Version) -> tuple[AnyConfig, Base, str | None]:
    """Return (config whose `model` names the model of the base, base, adapter's folder of an adapter-only version)."""
    name = f"models:/{version.name}/{version.number}"
    root = config.run.storage
    own = _own_export(config, version)
    if version.adapter_only or (own is None and not storage.is_uri(root)):
        target = targets.resolve(name, config)
        return target.config, with_tokenizer(target.base, target.config), target.adapter
    if own is None:
        # Only the driver reads from MLflow. The copy for the nodes is made once.
        key = digest(resolve_uri(config), version.name, version.number, version.checksum, length=16)
        own = storage.join(root, "models", key)
        if not storage.exists(storage.join(own, CONFIG)):
            registered = models.of_config(with_model(config, name))
            assert registered is not None
            node_cache.upload(registered.folder, own, last=CONFIG)
    named = with_model(config, own)
    base = with_tokenizer(find_model(named), named)
    if version.checksum:
        folder = Path(base.model.folder)
        Aliases.of(config, version.name).verify_copy(version.number, folder)
    return named, base, None


def _own_export(config: Config, version: Version) -> str | None:
    """Return the merged model in a version's run folder, so that MLflow's files need no copy in the storage.

    None if the folder was deleted, is not in this storage, or has another version since.
    """
    folder = RunFolder(recipe.where_now(version.folder, config.run.storage))
    result = records.read(folder.result, dict[str, Any]) or {}
    made = result.get("registered") or {}
    if (made.get("model"), str(made.get("version"))) != (version.name, version.number):
        return None
    here = folder.root.startswith(storage.join(config.run.storage, ""))
    return folder.merged if here else None


def _same_tokens(tokenizers: Sequence[str]) -> None:
    if len(set(tokenizers)) > 1:
        raise NotComparable(
            "the champion has another tokenizer, so the two losses cannot be compared"
        )


def note_file(rows: RowSet, version: Version, base: str = "") -> str:
    """Return the file of a version's results; its name is a hash of everything that the results depend on.

    `base` is the digest of the model against which pairs are measured.
    """
    config = rows.config
    scorer = config.evaluation.scorer
    objective = objective_of(config.train)
    parts: list[Any] = [
        [version.name, version.number, version.run_id, version.checksum or None],
        rows.digest,
        config.evaluation.model_dump_json(),
        scoring.source_digest(scorer) if scorer else None,
        node_cache.code(),
        computed_by(config),
        *objective.identity().values(),
    ]
    if objective.reference:
        parts.append(base)
    if isinstance(version, Candidate):
        parts.append(f"shrunk to {version.factor}")
    key = digest_json(parts, length=32)
    return storage.join(config.run.storage, "retraining", "rows", f"{key}.json")
