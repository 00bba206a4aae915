"""What a version was trained on: the files, by digest, and how the held-out rows were drawn from them.

A version's tags have one digest for all of its data; the files behind it are noted under the storage by each
retraining. With data.eval_fraction the draw follows from a file's content, the seed and the fraction. So where one of
these has changed, rows that are held out now were trained on then, and a model that has learned them by heart cannot
be compared on them.
"""

from dataclasses import dataclass
from typing import Any

from olora_ray.common import sealed, storage
from olora_ray.config.schema import Config
from olora_ray.pipeline.fingerprint import TAGS
from olora_ray.tokens import manifest
from olora_ray.tokens.plan import Plan
from olora_ray.tracking.version import Version


@dataclass(frozen=True)
class KnownFiles:
    """The files that a version was trained on."""

    digests: frozenset[str]
    """SHA-256 of each."""
    draw: tuple[Any, Any] | None
    """Seed and fraction by which rows were held out of them; None: not known, it was noted by an older release."""


def note(config: Config, plan: Plan) -> None:
    """Keep the files behind a data digest: continuing trains on a part of them only."""
    place = _note(config, plan.digest())
    if not storage.exists(place):
        content = {"files": sorted({each.sha256 for each in plan.files}), "draw": list(_draw(plan))}
        storage.write_text(place, sealed.seal(content, indent=1))


def of_version(config: Config, version: Version) -> KnownFiles | None:
    """The files behind a version's data digest: as noted by an earlier retraining, or by its token store."""
    digest = version.tags.get(TAGS["data"], "")
    if noted := sealed.read_sealed(_note(config, digest)):
        draw = noted.get("draw")
        return KnownFiles(frozenset(noted["files"]), (draw[0], draw[1]) if draw else None)
    # No note under this storage: the version's training was not a retraining. Its token store may be left.
    try:
        inputs = manifest.read_manifest(storage.join(config.run.storage, "tokens", digest)).inputs
    except (FileNotFoundError, ValueError):  # a storage that does not answer now is no store that is gone
        return None
    files = frozenset(sha256 for source in inputs["sources"] for _, sha256 in source["files"])
    return KnownFiles(files, (inputs["seed"], inputs["eval_fraction"]))


def unseen(config: Config, held_out: Plan, known: KnownFiles | None) -> frozenset[int] | None:
    """Numbers of the files in the plan of the held-out rows on whose rows a version was surely not trained.

    None: on none of them all. `known` are the files it was trained on; None: that is not known.
    """
    if config.data.eval_fraction is None:
        return None
    if known is None or known.draw not in (None, _draw(held_out)):
        return frozenset()
    if known.digests <= {each.sha256 for each in held_out.files}:
        return None  # files were added only: what is held out of the others is the same as then
    # A file has changed or is gone. What is new may be it, under whatever name.
    return frozenset(number for number, each in enumerate(held_out.files) if each.sha256 in known.digests)


def _draw(plan: Plan) -> tuple[Any, Any]:
    return (plan.seed, plan.eval_fraction)


def _note(config: Config, digest: str) -> str:
    return storage.join(config.run.storage, "retraining", "files", f"{digest}.json")
