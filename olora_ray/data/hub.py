"""hf://ORG/NAME?split=...&name=...&revision=... as Parquet files that every node can read.

The driver loads the data set once through `datasets`; workers never talk to the hub.
"""

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from olora_ray.common import storage
from olora_ray.common.digests import digest
from olora_ray.common.errors import UserError, as_user_error
from olora_ray.common.hub import is_away

ROWS_PER_FILE = 100_000
OPTIONS = {"split", "name", "revision"}


def as_parquet(uri: str, field: str, storage_root: str) -> list[str]:
    """Write a data set of the hub below `storage_root`, unless it is there, and list its files.

    Raises UserError that starts with `field` if the hub does not deliver it.
    """
    parts = urlsplit(uri)
    query = parts.query.replace("+", "%2B")  # of `split=train+test`: in a form's query it would be a space
    options = {key: values[0] for key, values in parse_qs(query).items()}
    if unknown := sorted(set(options) - OPTIONS):
        raise UserError(f"{field}: {uri}: unknown option {unknown[0]!r}; there are {', '.join(sorted(OPTIONS))}")
    name = parts.netloc + parts.path
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        # `datasets` would take a path for a folder of this machine.
        raise UserError(f"{field}: {uri}: {name!r} is no data set of the hub; write hf://ORG/NAME")
    dataset = _load(name, options, uri, field)
    key = digest(uri, dataset._fingerprint, length=32)
    place = storage.join(storage_root, "tokens", "hub", key)
    listing = storage.join(place, "files.json")
    if not storage.exists(listing):
        storage.write_text(listing, json.dumps(_write(dataset, place)))
    return [storage.join(place, name) for name in json.loads(storage.read_text(listing))]


def _load(name: str, options: dict[str, str], uri: str, field: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    # Exception: the hub, the network and the data set's own files each raise their own kinds.
    with as_user_error(f"{field}: {uri}", Exception, passes=is_away):
        return datasets.load_dataset(
            name, options.get("name"), split=options.get("split", "train"), revision=options.get("revision")
        )


def _write(dataset: Any, place: str) -> list[str]:
    pieces = max(1, -(-len(dataset) // ROWS_PER_FILE))
    names = [f"part-{number:05d}.parquet" for number in range(pieces)]
    temporary = tempfile.mkdtemp(prefix="olora-hub-")
    try:
        for number, name in enumerate(names):
            file = Path(temporary, name)
            dataset.shard(pieces, number, contiguous=True).to_parquet(str(file))
            storage.write_bytes(storage.join(place, name), file.read_bytes())
            file.unlink()
    finally:
        shutil.rmtree(temporary)
    return names
