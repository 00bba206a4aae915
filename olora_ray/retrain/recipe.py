"""Recipe of the next version: from the base model on all data, or from the champion on the new data.

    retrain.from: base       all rows; the adapter starts as its method says
    retrain.from: champion   the champion's adapter continues, on all rows of the new files, and on the share
                             retrain.replay of the rows of the known files, drawn again each night because the draw
                             depends on all files (tokens/plan.py)

A file is new if no file of the champion's training data has the same bytes. So a file that has grown is new with all
its rows. Rows that data.eval_fraction holds out stay held out, because the draw follows from a file's content. If the
champion cannot be continued (another base model or adapter, no new file, a missing checkpoint), the version starts from
the base model, and the log says why.
"""

import contextlib
import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from olora_ray.common import node_cache, records, storage
from olora_ray.common.errors import UserError
from olora_ray.common.secrets import mask
from olora_ray.common.storage import digest_json
from olora_ray.common.text import plural
from olora_ray.config.decided import DataConfig
from olora_ray.config.load import flatten, override, read_config
from olora_ray.config.schema import OF_PAIRS, Config
from olora_ray.config.section import Source, extended, is_auto
from olora_ray.data.formats import format_named
from olora_ray.evaluation.groups import check_column, count_planned
from olora_ray.evaluation.rows import lower_is_better
from olora_ray.model.source import glance
from olora_ray.pipeline.run_folder import (
    Fingerprint,
    earlier_settings_digest,
    identity_settings,
    settings_digest,
)
from olora_ray.tokens import prepare
from olora_ray.tokens.plan import Plan, Split, sources_of
from olora_ray.tokens.store import TokenStore
from olora_ray.tracking.aliases import CHALLENGER, CHAMPION, PREVIOUS, Aliases
from olora_ray.tracking.checksums import AGAINST, Version

if TYPE_CHECKING:
    from olora_ray.pipeline.base import Base

logger = logging.getLogger(__name__)

# Changes since the champion was made: found by digests of the contents, without Ray.


@dataclass(frozen=True)
class Inputs:
    base: "Base"
    plan: Plan  # of the training data
    held_out: Plan
    fingerprint: Fingerprint
    config: Config
    """The user's config, with the formats that were recognised in the sources, and with the length of sequences."""
    data: DataConfig
    """The config with which rows become tokens."""


def read_inputs(config: Config) -> Inputs:
    """Read base model and data as far as their digests need it. Files that were scanned before are not read again.

    Raises UserError for problems that would stop the training: missing files, an invalid model, no held-out rows.
    """
    if not config.data.holds_out():
        raise UserError(
            "data.eval: retraining compares on held-out rows; set data.eval or data.eval_fraction"
        )
    from olora_ray.pipeline.base import open_base
    from olora_ray.pipeline.prepare import read_data

    model = glance(config)
    base = open_base(config)
    seen = prepare.look_here(config)
    data = read_data(config, base).config
    plan = prepare.plan_here(data, base.spec, "train", seen)
    held_out = prepare.plan_here(data, base.spec, "eval", seen)
    made_of = Fingerprint(
        base.model.digest,
        plan.digest(),
        held_out.digest(),
        settings_digest(config),
        earlier_settings_digest(config),
    )
    files = [(each.file.uri, each.sha256) for each in (*plan.files, *held_out.files)]
    if model:
        node_cache.keep(_kept_at(config, model, files), records.text_of(made_of))
    found: dict[str, Any] = {
        "data.max_length": data.data.max_length,
        "gate.metric": data.gate.metric,
    }
    for each in (plan, held_out):
        setting, _ = sources_of(config, each.split)
        found[setting] = [source.model_dump(mode="json") for source in each.sources]
    return Inputs(base, plan, held_out, made_of, override(config, found), data)


def cached_fingerprint(config: Config) -> Fingerprint | None:
    """Return the fingerprint that `read_inputs` stored on this node for the same config and files; else None."""
    # Without opening the base model: its imports are most of the time of a night without changes.
    if not config.data.holds_out():
        return None
    model = glance(config)
    if not model:
        return None
    seen = prepare.look_here(config)
    files = []
    for split in get_args(Split):
        _, listed, scanned = seen(*sources_of(config, split))
        for matches, scans in zip(listed, scanned, strict=True):
            files += [(file.uri, scan.sha256) for file, scan in zip(matches, scans, strict=True)]
    kept = node_cache.read(_kept_at(config, model, files))
    if not kept:
        return None
    return records.parsed(kept, Fingerprint)


def _kept_at(config: Config, model: str, files: Sequence[tuple[str, str]]) -> str:
    template = config.data.chat_template or ""
    if template and storage.exists(template):
        template = storage.read_text(template)
    return node_cache.result_path(
        "fingerprints", config.model_dump_json(), model, template, json.dumps(files)
    )


def find_decision(
    versions: Sequence[Version], champion: Version | None, now: Fingerprint
) -> Version | None:
    """Return the version that makes another training with the same inputs useless; None if there is none.

    That is the champion or its substitute if it has the same inputs. Otherwise it is a version with the same inputs
    that was rolled back, or judged against this champion. A version that was judged against another champion is judged
    again.
    """
    if champion is not None and not now.changes(Fingerprint.from_tags(champion.tags)):
        return champion
    against = champion.number if champion is not None else ""
    for version in reversed(versions):
        if not version.verdict or now.changes(Fingerprint.from_tags(version.tags)):
            continue
        # A call may have been killed between the refusal of a version and the decision on its shrunk one.
        judged = version.tags.get(AGAINST) == against and shrunk_to(version) is None
        if version.rolled_back or judged:
            return version
    return None


# The version that a challenger must beat: the champion, or a substitute if its alias or its version was deleted.


@dataclass(frozen=True)
class Baseline:
    """The version that a challenger must beat, and the state of the registry."""

    version: Version | None
    """None: the model has never had a champion."""
    role: str
    """The role of this version, for the log: the champion, or a substitute."""
    champion: str
    """Version with the alias `champion`; empty if that alias is missing."""
    versions: Sequence[Version]
    """All versions of the model, the oldest first."""


def version_to_beat(aliases: Aliases) -> Baseline:
    """Return the version that a challenger must beat; raise UserError if the champion and all substitutes are lost."""
    last = aliases.last_champion()
    named = aliases.current()
    versions = aliases.versions()
    there = {version.number: version for version in versions}
    champion = named.get(CHAMPION, "")
    if champion in there:
        return Baseline(there[champion], "the champion", champion, versions)
    # These have been champions: the gate's verdict says passed, or they were promoted by hand.
    passed = [each for each in versions if each.verdict and not each.verdict.startswith("refused")]
    newest = (version for version in reversed(passed) if not version.rolled_back)
    substitutes = {
        "the last champion": there.get(last or ""),
        "the previous champion": there.get(named.get(PREVIOUS, "")),
        "the newest that passed": next(newest, None),
    }
    gone = "the alias champion is missing"
    if last is not None and last not in there:
        gone = f"the champion, version {last}, was deleted"
    for role, version in substitutes.items():
        if version is not None and not version.rolled_back:
            logger.warning(
                f"registry: {aliases.name}: {gone}; a new version must beat version {version.number}, {role};"
                f" set a champion with: olora-ray registry promote {aliases.name} VERSION"
            )
            return Baseline(version, role, champion, versions)
    against = any(version.tags.get(AGAINST) for version in versions)
    if last or PREVIOUS in named or passed or against:
        raise UserError(
            f"registry.model={aliases.name}: {gone}, and no other version that passed is left to compare with; set a"
            f" champion with: olora-ray registry promote {aliases.name} VERSION, or delete the registered model to"
            " start again"
        )
    return Baseline(None, "no champion", champion, versions)


# The training data of a version: its files, by digest, and how the held-out rows were drawn from them.


@dataclass(frozen=True)
class KnownFiles:
    files: frozenset[str]  # SHA-256
    draw: tuple[Any, Any]
    """Seed and fraction by which rows of the files were held out."""


def note(config: Config, plan: Plan) -> None:
    """Write down the files of a training, because a later version continues it on other files alone."""
    path = _note(config, plan.digest())
    if not storage.exists(path):
        content = {
            "files": sorted({each.sha256 for each in plan.files}),
            "draw": [plan.seed, plan.eval_fraction],
        }
        records.write(path, content, indent=1, sealed=True)


def of_version(config: Config, version: Version) -> KnownFiles | None:
    """Return the files behind a version's data digest, from an earlier note or from its token store; else None."""
    digest = Fingerprint.from_tags(version.tags).data
    noted = records.read(_note(config, digest), KnownFiles, sealed=True)
    if noted is not None:
        return noted
    # No note in this storage: the version does not come from a retraining. Its token store may still exist.
    try:
        inputs = TokenStore.open(storage.join(config.run.storage, "tokens", digest)).manifest.inputs
    except UserError:
        return None
    files: set[str] = set()
    for source in inputs["sources"]:
        files.update(sha256 for _, sha256 in source["files"])
    return KnownFiles(frozenset(files), (inputs["seed"], inputs["eval_fraction"]))


def unseen_rows(config: Config, held_out: Plan, known: KnownFiles | None) -> frozenset[int] | None:
    """Return the numbers of the held-out files whose rows the version was certainly not trained on; None: all files.

    `known` are the files of its training; None: unknown.
    """
    if config.data.eval_fraction is None:
        return None
    if known is None or known.draw != (held_out.seed, held_out.eval_fraction):
        return frozenset()
    if known.files <= {each.sha256 for each in held_out.files}:
        return None  # files were only added, so the old files hold out the same rows as before
    # A file was changed, renamed or deleted. Any new file may be its successor, so only unchanged files count.
    return frozenset(
        number for number, each in enumerate(held_out.files) if each.sha256 in known.files
    )


def _note(config: Config, digest: str) -> str:
    return storage.join(config.run.storage, "retraining", "files", f"{digest}.json")


ORIGIN = "olora.retrained_from"
# Tag of a version: rows of the files behind its data digest.
ROWS = "olora.data_rows"
_CONTINUED = "champion, version "
# Tag of a version: the inputs that differ from those of the version that it had to beat.
CHANGED = "olora.changed"


# Tag of a refused version: the part of its change that passes, and is decided as a version of its own; "" if none.
SHRUNK = "olora.shrunk_to"


def shrunk_to(version: Version) -> float | None:
    """Return the part of a refused version's change that is decided in its place; None if there is none."""
    part = version.tags.get(SHRUNK)
    if not part or not version.verdict.startswith("refused"):
        return None
    return float(part)


def changed(inputs: Inputs, champion: Version) -> str:
    """Return the changes since a version, with both names of a base model that has changed."""
    words = inputs.fingerprint.changes(Fingerprint.from_tags(champion.tags))
    was = champion.base
    now = mask(inputs.base.model.shown())
    if "base model" in words and was and was != now:
        words[words.index("base model")] = f"base model ({was} is now {now})"
    known = of_version(inputs.config, champion)
    same = known is not None and known.files == {each.sha256 for each in inputs.plan.files}
    if "training data" in words and same:
        words[words.index("training data")] += (
            " (the same files, of which this config or release makes other sequences)"
        )
    return ", ".join(words)


def training_config(
    config: Config, inputs: Inputs, champion: Version | None
) -> tuple[Config, dict[str, str]]:
    """Return the config of the training, and the tags of its version, which describe all its data.

    The run name is a hash of the training's inputs, so that an interrupted run is resumed.

    Raises UserError for a gate that nothing could pass or that does not fit the held-out rows, and if many rows of the
    champion's data are missing.
    """
    # Otherwise the gate would say so only after the training.
    check_column(config.gate.group, inputs.held_out)
    if champion is not None:
        _refuse_if_shrunk(config, inputs.plan.file_rows, champion)
        _check_held_out(config, inputs, champion)
    changes: dict[str, Any] = {"registry.alias": CHALLENGER}
    origin = None  # None: from the base model
    if config.retrain.origin == "champion" and champion is not None:
        start = _continued(config, inputs, champion)
        if isinstance(start, str):
            logger.info(
                f"retrain.from=champion: version {champion.number} is not continued, because {start};"
                " using the base model"
            )
        else:
            changes["train.start"], sources = start
            changes["data.train"] = [source.model_dump(mode="json") for source in sources]
            origin = champion.number
    wanted = override(config, changes)
    # The name depends on the contents, the start version, and all settings that a run folder is bound to.
    parts = [inputs.fingerprint.tags(), origin, identity_settings(flatten(wanted))]
    name = extended(config.run.name, digest_json(parts, length=8))
    tags = {ROWS: str(inputs.plan.file_rows), ORIGIN: f"{_CONTINUED}{origin}" if origin else "base"}
    if champion is not None:
        tags[CHANGED] = f"changed since version {champion.number}: {changed(inputs, champion)}"
    return override(wanted, {"run.name": name}), {**inputs.fingerprint.tags(), **tags}


def continued_version(version: Version) -> str | None:
    """Return the version whose adapter this version continues; None if it started from the base model."""
    origin = version.tags.get(ORIGIN, "")
    if not origin.startswith(_CONTINUED):
        return None
    return origin.removeprefix(_CONTINUED)


def _refuse_if_shrunk(config: Config, rows: int, champion: Version) -> None:
    # Many missing rows are usually a failed copy or export of the data.
    had = champion.tags.get(ROWS)
    if not had:
        return  # the champion does not come from a retraining
    if rows < int(had) * (1 - config.retrain.may_shrink):
        raise UserError(
            f"data.train: {rows:,} rows, but the champion, version {champion.number}, had {int(had):,}: more than"
            f" the share retrain.may_shrink={config.retrain.may_shrink:g} is missing; restore the files or, if this is"
            " intended, run once with retrain.may_shrink=1"
        )


def _check_held_out(config: Config, inputs: Inputs, champion: Version) -> None:
    """Raise UserError if the gate could pass no version, because it has too few held-out rows to compare on."""
    unseen = unseen_rows(config, inputs.held_out, of_version(config, champion))
    if unseen is not None:
        why = (
            f"data.eval_fraction: the champion, version {champion.number}, may have been trained on rows that are held"
            " out now, because a file of its training data, run.seed or the fraction has changed or is unknown"
        )
        if not unseen:
            raise UserError(
                f"{why}; no row is left to compare on: restore what has changed and put new rows into other files of"
                " data.train, or hold out rows in a file of their own (data.eval instead of data.eval_fraction)"
            )
        logger.warning(
            f"{why}; the gate uses only the held-out rows of {plural(len(unseen), 'unchanged file')}"
        )
    gate = config.gate
    of_pairs = gate.metric in OF_PAIRS
    scored = not (of_pairs or is_auto(gate.metric) or lower_is_better(gate.metric))
    if scored and config.evaluation.rows < gate.min_rows:
        raise UserError(
            f"evaluation.rows: {plural(config.evaluation.rows, 'row')} with {gate.metric}, but gate.min_rows needs"
            f" {gate.min_rows}, so nothing could be promoted; set evaluation.rows higher or gate.min_rows lower"
        )
    if of_pairs:
        unseen = _files_of_pairs(inputs.held_out, unseen)
    rows = count_planned(gate.group, inputs.held_out, gate.min_rows, unseen)
    if rows < gate.min_rows:
        what = plural(rows, "held-out pair" if of_pairs else "held-out row")
        if gate.group is not None:
            what = f"{plural(rows, 'group')} of held-out rows"
        raise UserError(
            f"gate.min_rows: the comparison with the champion has {what}, but needs {gate.min_rows}, so nothing could"
            " be promoted; hold out more rows, or set it lower"
        )


def _files_of_pairs(plan: Plan, among: Collection[int] | None) -> frozenset[int]:
    """Return the numbers of the files whose rows are preference pairs; `among` limits them (None: all files)."""
    found = set[int]()
    for number, each in enumerate(plan.files):
        makes = format_named(plan.sources[each.source].format).makes
        if makes == "pair" and (among is None or number in among):
            found.add(number)
    return frozenset(found)


def _continued(
    config: Config, inputs: Inputs, champion: Version
) -> tuple[str, tuple[Source, ...]] | str:
    """Return the checkpoint from which training continues, and its sources; or why the champion is not continued."""
    if Fingerprint.from_tags(champion.tags).base != inputs.base.model.digest:
        return "it has another base model"
    known = of_version(config, champion)
    if known is None:
        return f"its training files are not recorded in {config.run.storage}"
    if unseen_rows(config, inputs.held_out, known) is not None:
        return "it may have been trained on rows that are held out now"
    folder = where_now(champion.folder, config.run.storage)
    from olora_ray.train import checkpoints

    latest = None
    if folder:
        latest = checkpoints.latest_good(storage.join(folder, "checkpoints"))
    if latest is None:
        return f"{folder or 'its run folder'} has no checkpoint"
    path, checkpoint = latest
    if checkpoint.identity.get("adapter") != config.adapter.identity():
        return "its adapter has other settings"
    # A longer training with the same run.name, which is another version, may have written in the run folder. Not from
    # the checkpoint's config: there a worker has written the precision for `auto`.
    with contextlib.suppress(UserError, FileNotFoundError):  # settings of another release
        own = read_config(storage.join(folder, "config.yaml"))
        made_with = Fingerprint.from_tags(champion.tags).settings
        if made_with not in (settings_digest(own), earlier_settings_digest(own)):
            return f"{folder} was trained longer since"
    sources = _split(config, inputs.plan, known.files)
    if not sources:
        return "there is no new file"
    return path, sources


def where_now(folder: str, storage_root: str) -> str:
    """Return `folder`, or the folder of the same name in `storage_root` if the whole storage was moved."""
    moved = storage.join(storage_root, folder.rstrip("/").rpartition("/")[2])
    if folder and not storage.exists(folder) and storage.exists(moved):
        return moved
    return folder


def _split(config: Config, plan: Plan, known: Collection[str]) -> tuple[Source, ...]:
    """Split each source into its new files and, at a lower weight, its known files; empty if no file is new."""
    replay = config.retrain.replay
    parts = []
    some = False
    for number, source in enumerate(config.data.train):
        files = [each for each in plan.files if each.source == number]
        new = tuple(each.file.uri for each in files if each.sha256 not in known)
        old = tuple(each.file.uri for each in files if each.sha256 in known)
        added = source
        replayed = source
        if new and old:  # a source whose files are all new, or all known, keeps its own `only`
            added = source.model_copy(update={"only": new})
            replayed = source.model_copy(update={"only": old})
        if new:
            some = True
            parts.append(added)
        if old and replay > 0:
            parts.append(replayed.model_copy(update={"weight": source.weight * replay}))
    if not some:
        return ()
    return tuple(parts)
