"""Look at the versions of a registered model, and move the alias `champion` by
hand.

    python pipelines/registry.py list NAME
    python pipelines/registry.py show NAME VERSION
    python pipelines/registry.py promote NAME VERSION
    python pipelines/registry.py rollback NAME
    python pipelines/registry.py sign NAME VERSION --key PRIVATE
    python pipelines/registry.py verify NAME VERSION --key PUBLIC
    python pipelines/registry.py prune NAME --keep NUMBER [--dry-run]
    python pipelines/registry.py moved OLD NEW

NAME            the registered model
VERSION         a number or an alias
OLD, NEW        the folder of a storage (run.storage) before it was moved or
                copied, and now
--tracking-uri  MLflow's server or database, or env:VARIABLE or file:/PATH that
                holds its address; default: MLFLOW_TRACKING_URI, else
                ./runs/mlflow.db; for moved: NEW/mlflow.db
--keep          the number of newest versions that stay
--dry-run       only print what prune would delete
--key           an EC key in PEM: a path, file:/PATH, or env:VARIABLE that holds
                the key
--verify        for promote, rollback and show: a public key, whose private key
                must have signed VERSION; default: OLORA_VERIFY

list prints a line per version, with the held-out loss before > after training
and the lowest of the scorer's means (of preference pairs the share preferred);
show prints all about one version: loss, score, decision, base model, data,
code, who made it, cost and files. On a terminal both fit its window. promote
makes VERSION the champion; rollback makes the previous champion the champion
again. sign writes a signature beside the files; verify checks it. prune deletes
older versions in MLflow with their files, never one with an alias, the last
champion, or the best version that the gate still compares with. All but list,
prune and moved check the files against their checksums. moved corrects the
paths in MLflow's SQLite database after a storage was moved: runs and versions
stay the same.

Exit codes: 0 done; 2 an error that you can fix, a wrong file or signature; 75
MLflow or the files are unreachable, try again later.
"""

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from olora_ray.common.errors import UserError
from olora_ray.common.logs import quiet_environment
from olora_ray.common.text import minute, paragraph, plural, shortened, table, window
from olora_ray.config import command_line
from olora_ray.tracking import checksums, old_versions, start
from olora_ray.tracking.aliases import Aliases, registered
from olora_ray.tracking.client import reachable, shown_uri
from olora_ray.tracking.moved_storage import DATABASE, relocate_artifacts

# Limits of `show`: characters of a tag, and files.
WIDTH = 160
FILES = 8


def main(argv: list[str]) -> None:
    parsed = command_line.parse(
        argv or ["--help"],
        __doc__ or "",
        flags=["--dry-run"],
        options=["--tracking-uri", "--key", "--verify", "--keep"],
    )
    # Before MLflow is imported.
    quiet_environment()
    action, *names = parsed.words or [""]
    if action not in ACTIONS:
        raise UserError(f"argument {action!r}: expected one of {', '.join(ACTIONS)}")
    act, wanted = ACTIONS[action]
    if len(names) != len(wanted):
        raise UserError(
            f"usage: olora-ray registry {' '.join([action, *wanted])} [--tracking-uri URI]"
        )
    key = parsed.options.get("--key")
    if (key is not None) != (act in (sign, verify)):
        raise UserError("argument --key: sign and verify need it, and no other action takes it")
    keep = parsed.options.get("--keep")
    if (keep is not None) != (act is prune) or (parsed.flags and act is not prune):
        raise UserError("argument --keep: prune needs it; no other action takes it or --dry-run")
    given = parsed.options.get("--tracking-uri")
    if act is moved:
        moved(names[0], names[1], given)
        return
    public = parsed.options.get("--verify")
    if act is verify:
        public = key
    if act is sign:  # its files are checked before they have a signature
        public = ""
    aliases = registered(start.chosen_uri(given), names[0], public)
    if act is prune:
        prune(aliases, str(keep), bool(parsed.flags))
        return
    if key is not None:
        names.append(key)
    act(aliases, *names[1:])


def show_all(aliases: Aliases) -> None:
    named = _aliases_by_version(aliases)
    rows = [("version", "aliases", "loss", "score", "gate", "created", "data")]
    for version in reversed(aliases.versions()):
        tags = version.tags
        rows.append(
            (
                version.number,
                ", ".join(named.get(version.number, [])) or "-",
                version.losses or "-",
                tags.get("olora.score") or "-",
                version.verdict or "-",
                minute(version.created),
                tags.get("olora.data_digest", "")[:8] or "-",
            )
        )
    print(table(rows))


def show_one(aliases: Aliases, which: str) -> None:
    """Print all facts about a version, with its largest files, and check them."""
    version = aliases.version(_number(aliases, which))
    number = version.number
    files_uri = aliases.files_uri(number)
    print(f"{aliases.name} version {number}")
    print(f"aliases: {', '.join(_aliases_by_version(aliases).get(number, [])) or 'none'}")
    print(f"loss:    {version.losses or 'not measured'}")
    print(f"score:   {version.tags.get('olora.score') or 'not measured'}")
    print(paragraph(f"gate:    {version.verdict or 'no decision'}", 9))
    print(f"created: {minute(version.created)}\nrun:     {version.run_id}\nfiles:   {files_uri}")
    tags = sorted(version.tags.items(), key=lambda tag: _place(tag[0]))
    width = window() or WIDTH
    for name, text in tags:
        if text:
            print(f"  {shortened(f'{name} = {text}', width - 2)}")
    with reachable(aliases.uri, upload=True):
        files = checksums.read_checksums(version, files_uri, aliases.uri)
    for name, entry in sorted(files.items(), key=lambda item: -item[1]["bytes"])[:FILES]:
        print(f"  {entry['sha256'][:16]}  {entry['bytes']:>13,}  {name}")
    print(f"all {aliases.verify(number)} files have their checksums")


def _place(tag: str) -> tuple[bool, bool, str]:
    """Return the order of a tag in `show`: digests, which only programs compare, come after the facts."""
    digest = tag.endswith(("digest", ".checksums", ".judged", ".code", ".commit"))
    return not tag.startswith("olora."), digest, tag


def promote(aliases: Aliases, which: str) -> None:
    number = _number(aliases, which)
    # Aliases.promote checks the files against their checksums before it moves the alias.
    old = aliases.promote(number, f"promoted by hand, {minute(time.time())}, {start.submitter()}")
    after = f", version {old} is previous" if old else ""
    print(f"{aliases.name}: version {number} is the champion{after}")


def rollback(aliases: Aliases) -> None:
    bad, good = aliases.rollback(f"by hand, {minute(time.time())}, {start.submitter()}")
    print(
        f"{aliases.name}: version {good} is the champion again, version {bad} is tagged as rolled back"
    )


def sign(aliases: Aliases, which: str, key: str) -> None:
    number = _number(aliases, which)
    count = aliases.verify(number)
    aliases.sign(number, key)
    print(f"{aliases.name}: version {number} is signed, with {count} files")


def verify(aliases: Aliases, which: str, key: str) -> None:
    number = _number(aliases, which)
    count = aliases.verify(number)
    print(f"{aliases.name}: version {number}: all {count} files are as signed by the key of {key}")


def prune(aliases: Aliases, keep: str, dry: bool) -> None:
    if not keep.isdecimal() or int(keep) < 1:
        raise UserError(f"argument --keep: {keep!r}; expected a number of versions, 1 or more")
    total = 0
    for version in old_versions.outdated(aliases, int(keep)):
        size = old_versions.size(aliases, version)
        if dry or old_versions.delete(aliases, version):
            print(f"version {version.number}: {size:,} bytes")
            total += size
    print(f"{aliases.name}: {total:,} bytes {'would be deleted' if dry else 'deleted'}")


def moved(old: str, new: str, given: str | None) -> None:
    database = Path(new, DATABASE).absolute()
    if given is None and database.is_file():
        given = f"sqlite:///{database}"
    uri = start.chosen_uri(given)
    count = relocate_artifacts(old, new, uri)
    print(f"{shown_uri(uri)}: {plural(count, 'path')} of artifacts below {old} lead to {new} now")


ACTIONS: dict[str, tuple[Callable[..., None], Sequence[str]]] = {
    "list": (show_all, ["NAME"]),
    "show": (show_one, ["NAME", "VERSION"]),
    "promote": (promote, ["NAME", "VERSION"]),
    "rollback": (rollback, ["NAME"]),
    "sign": (sign, ["NAME", "VERSION"]),
    "verify": (verify, ["NAME", "VERSION"]),
    "prune": (prune, ["NAME"]),
    "moved": (moved, ["OLD", "NEW"]),
}


def _number(aliases: Aliases, which: str) -> str:
    if re.fullmatch("[0-9]+", which):
        # MLflow writes no leading zeros, and would take 07 for another version than 7.
        return which.lstrip("0") or "0"
    current = aliases.current()
    if which not in current:
        raise UserError(
            f"{aliases.name} has no alias {which!r}; it has {', '.join(sorted(current)) or 'none'}"
        )
    return current[which]


def _aliases_by_version(aliases: Aliases) -> dict[str, list[str]]:
    named: dict[str, list[str]] = {}
    for alias, number in sorted(aliases.current().items()):
        named.setdefault(number, []).append(alias)
    return named


if __name__ == "__main__":
    command_line.run(main)
