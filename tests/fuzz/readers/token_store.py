"""A token store: manifest, sidecars and shards with other bytes, or a resealed manifest."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

from olora_ray.common.records import seal
from olora_ray.tokens.prepare import prepare as make_store
from olora_ray.tokens.store import TokenStore
from tests.fuzz import mutate
from tests.fuzz.case import Case, agree
from tests.tokens import helpers


def prepare(place: Path) -> tuple[dict[str, bytes], list[str]]:
    """The files of a good one, and its texts."""
    rows = helpers.write_jsonl(place / "rows.jsonl", [*helpers.rows(40), {"text": "no chat"}])
    store = make_store(helpers.config(place / "runs", rows, max_rejected=0.5), helpers.spec(), "train")
    return helpers.content(store.uri), helpers.texts(store)


def cases(seed: int, made: tuple[dict[str, bytes], list[str]]) -> Iterator[Case]:
    """Changed files, and manifests that say something else and fit their own seal."""
    files, _ = made
    for number in range(10**9):
        random = Random(f"token store {seed} {number}")
        if number % 2:
            name = random.choice([name for name in files if not name.startswith("rejected")])
            yield Case((name, mutate.raw(random, files[name])))
        else:
            tree = json.loads(files["manifest.json"])
            tree.pop("seal")
            changed = mutate.tree(random, tree)
            yield Case(("manifest.json", seal(changed).encode() if isinstance(changed, dict) else b"[]"))


def read(content: tuple[str, bytes], place: Path, made: tuple[dict[str, bytes], list[str]]) -> None:
    """Every pack, and where its examples come from; whatever is read without an error is what was written."""
    files, texts = made
    name, changed = content
    folder = place / "read"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for each, whole in files.items():
        (folder / each).write_bytes(changed if each == name else whole)
    store = TokenStore.open(str(folder))
    for index in range(len(store)):
        store.origins(index)
    found = helpers.texts(store)
    if name != "manifest.json":  # which may be resealed
        agree(found, texts, "texts")
