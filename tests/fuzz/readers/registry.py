"""What the registry answers: a version's tags and checksums, and the tag of a move that was cut off."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from random import Random

from olora_ray.common import storage
from olora_ray.pipeline.run_folder import Fingerprint
from olora_ray.tracking import checksums
from olora_ray.tracking.aliases import CHAMPION, MOVE, Aliases
from olora_ray.tracking.checksums import Version
from olora_ray.tracking.client import connect
from tests import mlflow_database
from tests.fuzz import mutate
from tests.fuzz.case import Case

ANNOUNCED = {"previous": None, "verdicts": {"1": "passed"}}


def prepare(place: Path) -> tuple[Path, bytes, str]:
    """A version's folder with its checksums.json, and MLflow's address with a registered model of two versions."""
    folder = place / "version"
    (folder / "model").mkdir(parents=True)
    (folder / "MLmodel").write_text("x")
    (folder / "model" / "config.json").write_text("{}")
    text = checksums.of_folders({"": folder})
    uri = f"sqlite:///{mlflow_database.place(place / 'runs')}/mlflow.db"
    logging.getLogger("alembic").setLevel(logging.ERROR)
    client = connect(uri)
    client.create_registered_model("small")
    for _ in range(2):
        client.create_model_version("small", str(folder))
    client.set_registered_model_alias("small", CHAMPION, "1")
    return folder, text.encode(), uri


def cases(seed: int, made: tuple[Path, bytes, str]) -> Iterator[Case]:
    """Changed checksums, resealed or not; moves with other values; versions with other tags."""
    _, text, _ = made
    for number in range(10**9):
        random = Random(f"registry {seed} {number}")
        match number % 4:
            case 0:
                changed = mutate.raw(random, text)
                yield Case(("checksums", changed, False), refuse=changed != text)
            case 1 | 2:
                yield Case(("checksums", mutate.as_json(mutate.tree(random, json.loads(text)), random).encode(), True))
            case _:
                changed = (
                    mutate.as_json(mutate.tree(random, ANNOUNCED), random).encode()
                    if random.random() < 0.8
                    else mutate.raw(random, json.dumps(ANNOUNCED).encode())
                )
                yield Case(("move", changed, False))


def read(content: tuple[str, bytes, bool], place: Path, made: tuple[Path, bytes, str]) -> None:
    """Verified, as before a promotion; or looked at, as by each command of the registry."""
    folder, text, uri = made
    kind, changed, reseal = content
    if kind == "checksums":
        (folder / checksums.FILE).write_bytes(changed)
        sealed = changed if reseal else text
        tags = {checksums.TAG: storage.digest_bytes(sealed), "olora.base_digest": str(changed)}
        Fingerprint.from_tags(tags).tags()
        checksums.verify(Version("small", "1", tags), str(folder), uri)
        return
    aliases = Aliases(uri, "small")
    aliases.client.set_model_version_tag("small", "1", MOVE, changed.decode(errors="replace")[:4000])
    aliases.repair()
    aliases.current()
