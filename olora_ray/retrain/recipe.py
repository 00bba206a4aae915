"""Recipe of the next version: from the base on everything, or from the champion on what is new.

    retrain.from: base       all rows, the adapter starts as its method says
    retrain.from: champion   the champion's adapter continues; all rows of the files that it does not know, and the
                             share retrain.replay of the rows of those that it knows, drawn anew each night
                             since the draw follows from all the files (tokens/plan.py)

A file is new if no file of the champion's training data has the same bytes: a file that has grown is new as a
whole. Rows that are held out by data.eval_fraction stay held out, since the draw follows from a file's content.
Where the champion cannot be continued (another base model or adapter, no new file, its checkpoint is gone) a
version is made from the base, and the log says why.
"""

import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from olora_ray.common import node_cache, storage
from olora_ray.common.errors import UserError
from olora_ray.common.storage import digest_json
from olora_ray.common.text import plural
from olora_ray.config.load import flatten
from olora_ray.config.schema import Config, Source, extended
from olora_ray.evaluation.groups import check_column, count_planned
from olora_ray.evaluation.rows import LOSS, PERPLEXITY
from olora_ray.model.source import glance
from olora_ray.pipeline.run_folder import TAGS, Fingerprint, bound_settings, settings_digest, where_now
from olora_ray.tokens import manifest, prepare
from olora_ray.tokens.plan import Plan, Split, as_found, sources_of
from olora_ray.tracking.aliases import CHALLENGER, CHAMPION, GATE, PREVIOUS, Aliases, rolled_back
from olora_ray.tracking.checksums import RUN, Version

if TYPE_CHECKING:
    from olora_ray.pipeline.base import Base

logger = logging.getLogger(__name__)

# Search for changes since the champion was made, by digests of contents and without Ray.


AGAINST = "olora.gate_against"
"""Tag of a version: the version that it had to beat when the gate decided; empty if there was none."""


@dataclass(frozen=True)
class Inputs:
    """The inputs of a retraining, as they are now."""

    base: "Base"
    plan: Plan
    """Of the training data."""
    held_out: Plan
    """Of the held-out rows."""
    fingerprint: Fingerprint
    config: Config
    """With the formats that the sources have."""


def look(config: Config) -> Inputs:
    """Read base model and data as far as their digests need it; files that were scanned before are not read again.

    Raises UserError for what training would refuse: missing files, a model that is none, nothing held out.
    """
    if not config.data.holds_out():
        raise UserError("data.eval: retraining compares with the champion on held-out rows; set it, or eval_fraction")
    from olora_ray.pipeline.base import open_base
    from olora_ray.pipeline.prepare import with_length

    model, base, seen = glance(config), open_base(config), prepare.look_here(config)
    long = with_length(config, base)
    plan = prepare.plan_here(long, base.spec, "train", seen)
    held_out = prepare.plan_here(long, base.spec, "eval", seen)
    made_of = Fingerprint(base.model.digest, plan.digest(), held_out.digest(), settings_digest(config))
    files = [(each.file.uri, each.sha256) for each in (*plan.files, *held_out.files)]
    if model:
        node_cache.keep(_kept_at(config, model, files), json.dumps(made_of.tags()))
    return Inputs(base, plan, held_out, made_of, as_found(long, plan, held_out))


def look_again(config: Config) -> Fingerprint | None:
    """The fingerprint that an earlier `look` on this node found for the same config and files; None if there is none.

    It takes none of the imports that opening a base takes, which is most of a night without changes.
    """
    if not config.data.holds_out() or not (model := glance(config)):
        return None
    seen, files = prepare.look_here(config), []
    for split in get_args(Split):
        _, listed, scanned = seen(*sources_of(config, split))
        for found, scans in zip(listed, scanned, strict=True):
            files += [(file.uri, scan.sha256) for file, scan in zip(found, scans, strict=True)]
    kept = node_cache.read(_kept_at(config, model, files))
    return Fingerprint.from_tags(json.loads(kept)) if kept else None


def _kept_at(config: Config, model: str, files: Sequence[tuple[str, str]]) -> str:
    template = config.data.chat_template or ""
    text = storage.read_text(template) if template and storage.exists(template) else template
    return node_cache.place("fingerprints", config.model_dump_json(), model, text, json.dumps(files))


def find_decision(versions: Sequence[Version], champion: Version | None, now: Fingerprint) -> Version | None:
    """The version that makes another training of the same useless.

    That is the champion, or its substitute, if it was made of the same; else a version made of the same that was rolled
    back, or that was judged against this champion. If it was judged against another one, the gate decides again.
    """
    if champion is not None and not now.changes(Fingerprint.from_tags(champion.tags)):
        return champion
    against = champion.number if champion is not None else ""
    for version in reversed(versions):
        if GATE not in version.tags or now.changes(Fingerprint.from_tags(version.tags)):
            continue
        if rolled_back(version) or version.tags.get(AGAINST) == against:
            return version
    return None


# The version that a challenger must beat: the champion, or a substitute if its alias or its version was deleted.


@dataclass(frozen=True)
class ToBeat:
    """The version that a challenger must beat, and the registry in which it was found."""

    version: Version | None
    """None: the model has never had a champion."""
    role: str
    """Of this version, for the log: the champion, or what it was."""
    champion: str
    """Version with the alias `champion`; empty if there is no such alias."""
    versions: Sequence[Version]
    """All versions of the model, the oldest first."""


def version_to_beat(aliases: Aliases) -> ToBeat:
    """Find the version that a challenger must beat; raises UserError if there was a champion and nothing is left."""
    last, named, versions = aliases.last_champion(), aliases.current(), aliases.versions()
    there, champion = {version.number: version for version in versions}, named.get(CHAMPION, "")
    if champion in there:
        return ToBeat(there[champion], "the champion", champion, versions)
    passed = [version for version in versions if _passed(version)]
    substitutes = {
        "the last champion": there.get(last or ""),
        "the newest that passed": next((version for version in reversed(passed) if not rolled_back(version)), None),
        "the champion before": there.get(named.get(PREVIOUS, "")),
    }
    deleted = last is not None and last not in there
    gone = f"the champion, version {last}, was deleted" if deleted else "the alias champion is missing"
    for role, version in substitutes.items():
        if version is not None and not rolled_back(version):
            logger.warning(
                f"registry: {aliases.name}: {gone}; a new version must beat version {version.number}, {role};"
                f" set a champion with: olora-ray registry promote {aliases.name} VERSION"
            )
            return ToBeat(version, role, champion, versions)
    if last or PREVIOUS in named or passed or any(version.tags.get(AGAINST) for version in versions):
        raise UserError(
            f"registry.model={aliases.name}: {gone}, and no other version that passed is left to compare with; set a"
            f" champion with: olora-ray registry promote {aliases.name} VERSION, or delete the registered model to"
            " begin anew"
        )
    return ToBeat(None, "no champion", champion, versions)


def _passed(version: Version) -> bool:
    """True if the version has been a champion, by its verdict: it passed, or a person promoted it."""
    return GATE in version.tags and not version.tags[GATE].startswith("refused")


# What a version was trained on: the files, by digest, and how the held-out rows were drawn from them.


@dataclass(frozen=True)
class KnownFiles:
    """The files that a version was trained on."""

    digests: frozenset[str]
    """SHA-256 of each."""
    draw: tuple[Any, Any]
    """Seed and fraction by which rows were held out of them."""


def note(config: Config, plan: Plan) -> None:
    """Keep the files behind a data digest: continuing trains on a part of them only."""
    place = _note(config, plan.digest())
    if not storage.exists(place):
        content = {"files": sorted({each.sha256 for each in plan.files}), "draw": [plan.seed, plan.eval_fraction]}
        storage.write_text(place, storage.seal(content, indent=1))


def of_version(config: Config, version: Version) -> KnownFiles | None:
    """The files behind a version's data digest: as noted by an earlier retraining, or by its token store."""
    digest = version.tags.get(TAGS["data"], "")
    if noted := storage.read_sealed(_note(config, digest)):
        return KnownFiles(frozenset(noted["files"]), (noted["draw"][0], noted["draw"][1]))
    # No note under this storage: the version's training was not a retraining. Its token store may be left.
    try:
        inputs = manifest.read_manifest(storage.join(config.run.storage, "tokens", digest)).inputs
    except (FileNotFoundError, ValueError):  # a storage that does not answer now is no store that is gone
        return None
    files = frozenset(sha256 for source in inputs["sources"] for _, sha256 in source["files"])
    return KnownFiles(files, (inputs["seed"], inputs["eval_fraction"]))


def unseen_rows(config: Config, held_out: Plan, known: KnownFiles | None) -> frozenset[int] | None:
    """Numbers of the files in the plan of the held-out rows on whose rows a version was surely not trained.

    None: on none of them all. `known` are the files it was trained on; None: that is not known.
    """
    if config.data.eval_fraction is None:
        return None
    if known is None or known.draw != (held_out.seed, held_out.eval_fraction):
        return frozenset()
    if known.digests <= {each.sha256 for each in held_out.files}:
        return None  # files were added only: what is held out of the others is the same as then
    # A file has changed or is gone. What is new may be it, under whatever name.
    return frozenset(number for number, each in enumerate(held_out.files) if each.sha256 in known.digests)


def _note(config: Config, digest: str) -> str:
    return storage.join(config.run.storage, "retraining", "files", f"{digest}.json")


ORIGIN = "olora.retrained_from"
ROWS = "olora.data_rows"
"""Tag of a version: rows of the files behind its data digest."""
_CONTINUED = "champion, version "


@dataclass(frozen=True)
class Recipe:
    """Config and tags of the run that makes the version."""

    config: Config
    tags: dict[str, str]
    """For the version: what it stands on, whatever of it was trained on this time."""


@dataclass(frozen=True)
class _Start:
    """The champion, ready to be continued."""

    checkpoint: str
    sources: tuple[Source, ...]
    version: str


def make(config: Config, inputs: Inputs, champion: Version | None) -> Recipe:
    """Build the recipe. The run name is a hash of its inputs, so an interrupted run is found and resumed.

    Raises UserError for a gate that nothing could pass, or that cannot be applied to the held-out rows, and for data of
    which much is missing since the champion was made.
    """
    check_column(config.gate.group, inputs.held_out)  # else the gate would say so, after the training
    note(config, inputs.plan)
    if champion is not None:
        _refuse_if_shrunk(config, inputs.plan.file_rows, champion)
        unseen = _unseen(config, inputs, champion)
        _refuse_if_too_few(config, inputs, unseen)
    start = None  # from the base, unless the champion can be continued
    if config.retrain.origin == "champion" and champion is not None:
        found = _continued(config, inputs, champion)
        if isinstance(found, str):
            logger.info(
                f"retrain.from=champion: version {champion.number} is not continued, {found}: training from the base"
            )
        else:
            start = found
    wanted = config.model_copy(update={"registry": config.registry.model_copy(update={"alias": CHALLENGER})})
    if start:
        train = config.train.model_copy(update={"start": start.checkpoint})
        data = config.data.model_copy(update={"train": start.sources})
        wanted = wanted.model_copy(update={"train": train, "data": data})
    # The name follows from contents, the version to start from, and all settings that a run's folder is bound to.
    parts = [inputs.fingerprint.tags(), start.version if start else None, bound_settings(flatten(wanted))]
    name = extended(config.run.name, digest_json(parts, length=8))
    origin = f"{_CONTINUED}{start.version}" if start else "base"
    return Recipe(
        wanted.model_copy(update={"run": config.run.model_copy(update={"name": name})}),
        {**inputs.fingerprint.tags(), ROWS: str(inputs.plan.file_rows), ORIGIN: origin},
    )


def continued_version(version: Version) -> str | None:
    """The version whose adapter this one continues; None if it was made from the base."""
    origin = version.tags.get(ORIGIN, "")
    return origin.removeprefix(_CONTINUED) if origin.startswith(_CONTINUED) else None


def _refuse_if_shrunk(config: Config, rows: int, champion: Version) -> None:
    """Raise UserError if many rows are missing: a copy or an export of the data may have failed."""
    if not (had := champion.tags.get(ROWS)):
        return  # its run was not a retraining
    if rows < int(had) * (1 - config.retrain.may_shrink):
        raise UserError(
            f"data.train: {rows:,} rows, but the champion, version {champion.number}, had {int(had):,}: more than the"
            f" share retrain.may_shrink={config.retrain.may_shrink:g} is missing; complete the files, or, if this is"
            " right, call once with retrain.may_shrink=1"
        )


def _unseen(config: Config, inputs: Inputs, champion: Version) -> frozenset[int] | None:
    """Numbers of the held-out files on which the gate compares; None: on all.

    Raises UserError if there is none: it would refuse whatever is trained.
    """
    unseen = unseen_rows(config, inputs.held_out, of_version(config, champion))
    why = (
        f"data.eval_fraction: version {champion.number}, the champion, may have been trained on rows that are held out"
        " now, because a file of its training data, run.seed or the fraction has changed or is not known any more"
    )
    if unseen is not None and not unseen:
        raise UserError(
            f"{why}; no row is left to compare on: set data.eval, or add files instead of changing them, or promote a"
            " run of finetune.py by hand"
        )
    if unseen is not None:
        logger.warning(f"{why}; the gate compares on those of {plural(len(unseen), 'unchanged file')} only")
    return unseen


def _refuse_if_too_few(config: Config, inputs: Inputs, unseen: frozenset[int] | None) -> None:
    """Raise UserError if there are fewer independent held-out rows than the gate asks for: it would refuse anything."""
    gate, scored = config.gate, config.gate.metric not in (LOSS, PERPLEXITY)
    asked = f"gate.min_rows asks for {gate.min_rows}"
    if scored and config.evaluation.rows < gate.min_rows:
        raise UserError(
            f"evaluation.rows: {plural(config.evaluation.rows, 'row')} with {gate.metric}, but {asked}, so that nothing"
            " could be promoted; set it higher, or gate.min_rows lower"
        )
    found = count_planned(gate.group, inputs.held_out, gate.min_rows, unseen)
    if found < gate.min_rows:
        what = plural(found, "held-out row") if gate.group is None else f"{plural(found, 'group')} of held-out rows"
        raise UserError(
            f"gate.min_rows: the champion is compared with on {what}, but it asks for {gate.min_rows}, so that nothing"
            " could be promoted; hold out more, or set it lower"
        )


def _continued(config: Config, inputs: Inputs, champion: Version) -> _Start | str:
    """The champion, ready to be continued, or the reason why it cannot be."""
    if champion.tags.get(TAGS["base"]) != inputs.base.model.digest:
        return "its base model is another"
    known = of_version(config, champion)
    if known is None:
        return f"what it was trained on is not known under {config.run.storage}"
    if unseen_rows(config, inputs.held_out, known) is not None:
        return "it may have been trained on rows that are held out now"
    folder = where_now(champion.tags.get(RUN, ""), config.run.storage)
    from olora_ray.train import checkpoints

    found = checkpoints.latest_good(storage.join(folder, "checkpoints")) if folder else None
    if found is None:
        return f"there is no checkpoint of it in {folder or 'its run folder'}"
    place, checkpoint = found
    if checkpoint.identity.get("adapter") != config.adapter.identity():
        return "its adapter has other settings"
    sources = _split(config, inputs.plan, known.digests)
    return _Start(place, sources, champion.number) if sources else "there is no new file"


def _split(config: Config, plan: Plan, known: Collection[str]) -> tuple[Source, ...]:
    """Each source as one of its new files and one, at a lower weight, of those that are known; empty if none is new."""
    parts, replay, some = [], config.retrain.replay, False
    # `only` is set where a source is split: a source that is new, or known, as a whole keeps its own.
    for number, source in enumerate(config.data.train):
        files = [each for each in plan.files if each.source == number]
        new = tuple(each.file.uri for each in files if each.sha256 not in known)
        old = tuple(each.file.uri for each in files if each.sha256 in known)
        if new:
            some = True
            parts.append(source.model_copy(update={"only": new if old else source.only}))
        if old and replay > 0:
            only = old if new else source.only
            parts.append(source.model_copy(update={"only": only, "weight": source.weight * replay}))
    return tuple(parts) if some else ()
