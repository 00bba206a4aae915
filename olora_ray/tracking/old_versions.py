"""Old versions of a registered model: which of them may go, and their deletion with the files.

A version without checksums, which another program has registered, stays: its files may be the only copy.
"""

from dataclasses import replace

from olora_ray.common import records
from olora_ray.common.errors import UserError
from olora_ray.tracking import checksums, models
from olora_ray.tracking.aliases import LAST, Aliases
from olora_ray.tracking.checksums import AGAINST, BASE, GATE, HELD_OUT, Version
from olora_ray.tracking.client import connect, reachable

# Tags of a version: the champion that is best on the held-out rows, and on the guard's, if this version is promoted.
ANCHOR = "olora.anchor"
GUARD = "olora.guard"
# Start of a tag of a registered model for each version that was deleted, or whose deletion has begun: the gate still
# counts on which held-out rows it was judged.
PRUNED = "olora.pruned."
JUDGED = {GATE, AGAINST, HELD_OUT}


def in_use(aliases: Aliases) -> set[str]:
    """Return the versions with an alias, the last champion, and the best champions with which the gate compares."""
    there = {version.number: version for version in aliases.versions()}
    named = {*aliases.current().values(), aliases.tags().get(LAST, "")}
    for number in named & there.keys():
        named |= {there[number].tags.get(tag, number) for tag in (ANCHOR, GUARD)}
    return named


def pruned(aliases: Aliases) -> list[Version]:
    """Return the versions that were deleted, or whose deletion has begun."""
    texts = [text for tag, text in aliases.tags().items() if tag.startswith(PRUNED)]
    return [version for text in texts if (version := records.parsed(text, Version))]


def outdated(aliases: Aliases, keep: int) -> list[Version]:
    """Return the versions that may go, the oldest first: those in use and the newest `keep` stay."""
    aliases.repair()
    versions = aliases.versions()
    begun = {version.number for version in pruned(aliases)}
    newest = {version.number for version in versions[-keep:]} - begun
    stay = newest | in_use(aliases)
    may = [each for each in versions if each.checksum and each.number not in stay]
    return [each for each in may if not _is_source(aliases, each)]


def _is_source(aliases: Aliases, version: Version) -> bool:
    """True if another version is a copy of this one, or an adapter on it."""
    address = f"models:/{version.name}/{version.number}"
    filters = [f"source_path = '{address}'", f"tags.`{BASE}` = '{address}'"]
    with reachable(aliases.uri):
        return any(map(aliases.client.search_model_versions, filters))


def size(aliases: Aliases, version: Version) -> int:
    """Return the bytes of a version's files; 0 if a deletion has already removed their list."""
    try:
        with reachable(aliases.uri, upload=True):
            place = aliases.files_uri(version.number)
            files = checksums.read_checksums(version, place, aliases.uri)
    except UserError:
        return 0
    return sum(each["bytes"] for each in files.values())


def delete(aliases: Aliases, version: Version) -> bool:
    """Delete a version and its files; False if it has come into use meanwhile.

    The version goes last, so that the next call completes a deletion that was killed.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    name = version.name
    number = version.number
    client = aliases.client
    with reachable(aliases.uri, upload=True):
        if number in in_use(aliases):
            return False
        found = client.get_model_version(name, number)
        short = {tag: version.tags[tag][:64] for tag in JUDGED & version.tags.keys()}
        aliases.tag(f"{PRUNED}{number}", records.text_of(replace(version, tags=short)))
        same = client.search_model_versions(f"source_path = '{found.source}'")
        for model in models.logged_by(aliases.uri, str(version.run_id)):
            if model.artifact_location == found.source and len(same) == 1:
                files = get_artifact_repository(found.source, tracking_uri=aliases.uri)
                files.delete_artifacts()
                client.delete_logged_model(model.model_id)
        client.delete_model_version(name, number)
        return True


def made_one_in_use(uri: str, run_id: str) -> bool:
    """True if an MLflow run has registered a version that is in use."""
    with reachable(uri):
        versions = connect(uri).search_model_versions(f"run_id = '{run_id}'")
    return any(str(each.version) in in_use(Aliases(uri, each.name)) for each in versions)
