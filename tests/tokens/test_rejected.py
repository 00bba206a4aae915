"""rejected.jsonl is written from a temporary file: the same lines, without holding them in memory."""

import json
from pathlib import Path

import pytest

from olora_ray.config.schema import Config
from olora_ray.data.tokenizer_spec import TokenizerSpec
from olora_ray.tokens.prepare import prepare
from tests.tokens import helpers


@pytest.fixture
def config(tmp_path: Path, small_shards: None) -> Config:
    """Many bad rows, from sources that are used one, three and a half times."""
    rows = [row for one in helpers.rows(300) for row in (one, {"x": one})]
    sources = [
        {"path": str(helpers.write_jsonl(tmp_path / f"{weight}.jsonl", rows)), "weight": weight}
        for weight in (1, 3, 2.5, 0.5)
    ]
    return helpers.config(tmp_path / "runs", *sources, max_rejected=1.0)


def expected(uri: str) -> str:
    """The entries of all sidecars in their order, each line at its first occurrence."""
    sidecars = [json.loads(path.read_text()) for path in sorted(Path(uri).glob("shard-*.json"))]
    lines = dict.fromkeys(
        json.dumps(entry) for sidecar in sidecars for entry in sidecar["rejected"]
    )
    return "".join(f"{line}\n" for line in lines)


def test_a_row_that_weights_repeat_is_listed_once_where_it_comes_first(
    config: Config, tiny_spec: TokenizerSpec
) -> None:
    store = prepare(config, tiny_spec, "train")
    found = Path(store.uri, "rejected.jsonl").read_text()
    assert found == expected(store.uri)
    assert 3 * 300 < len(found.splitlines()) < 4 * 300
    assert sum(store.manifest.rejected.values()) > 6 * 300  # each use counts
