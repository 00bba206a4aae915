import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.config.load import override
from olora_ray.config.schema import Config
from olora_ray.data.tokenizer_spec import TokenizerSpec
from olora_ray.tokens.manifest import shard_name
from olora_ray.tokens.plan import Counts
from olora_ray.tokens.prepare import prepare
from olora_ray.tokens.store import TokenStore
from tests.said import said
from tests.tokens import helpers
from tests.tokens.helpers import chat, content, rows


def test_packs(corpus: Config, tiny_spec: TokenizerSpec) -> None:
    store = prepare(corpus, tiny_spec, "train")
    manifest = store.manifest
    assert len(manifest.shards) == 12
    assert (manifest.rows, manifest.examples, manifest.rejected) == (741, 740, {"missing_field": 1})
    tokens = supervised = 0
    seen = set()
    for index in range(len(store)):
        pack = store[index]
        assert pack.input_ids.dtype == np.int32
        assert pack.supervised.dtype == bool
        assert len(pack.input_ids) == len(pack.supervised) == sum(pack.segments) <= 128
        starts = np.cumsum([0, *pack.segments[:-1]])
        assert not pack.supervised[starts].any()
        assert store.counts([index]) == sum(pack.examples(), Counts())
        assert store.counts([index]).supervised == pack.supervised.sum()
        assert store.counts([index]).tokens == len(pack.input_ids)
        assert len(store.origins(index)) == len(pack.segments)
        seen.update(store.origins(index))
        tokens += len(pack.input_ids)
        supervised += int(pack.supervised.sum())
    assert (tokens, supervised) == (manifest.tokens, manifest.supervised)
    assert store.counts(range(len(store))).supervised == supervised
    assert manifest.fill == round(tokens / (128 * len(store)), 4)
    assert len(seen) == 620
    with pytest.raises(IndexError):
        store[len(store)]


def test_what_is_done_is_not_made_again(corpus: Config, tiny_spec: TokenizerSpec) -> None:
    # The state after a kill: no manifest, a shard without its sidecar, missing shards.
    store = prepare(corpus, tiny_spec, "train")
    before = content(store.uri)
    folder = Path(store.uri)
    for name in (
        "manifest.json",
        "rejected.jsonl",
        "shard-00003.json",
        "shard-00007.json",
        "shard-00007.arrow",
    ):
        (folder / name).unlink()
    (folder / "shard-00003.arrow").write_bytes(b"half")
    kept = {path: path.stat().st_mtime_ns for path in folder.iterdir() if "00003" not in path.name}
    with said() as lines:
        prepare(corpus, tiny_spec, "train")
    assert content(store.uri) == before
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert any("10 of 12 shards exist already" in line for line in lines)


def test_a_remote_store_is_read_through_a_local_copy(
    corpus: Config, tiny_spec: TokenizerSpec, temporary: Path
) -> None:
    local = prepare(corpus, tiny_spec, "train")
    remote = TokenStore.open(f"file://{local.uri}")
    assert all(
        (remote[index].input_ids == local[index].input_ids).all() for index in range(len(local))
    )
    copies = list(temporary.glob(f"olora_ray-{os.getuid()}/tokens/{local.digest}/*.arrow"))
    assert len(copies) == 12
    # A copy that was damaged is fetched again.
    copies[0].write_bytes(bytes(copies[0].stat().st_size))
    again = TokenStore.open(remote.uri)
    assert all(
        (again[index].input_ids == local[index].input_ids).all() for index in range(len(local))
    )


def test_a_store_in_a_bucket_is_made_and_read_as_one_on_a_disk(
    corpus: Config, tiny_spec: TokenizerSpec, tmp_path: Path, temporary: Path, bucket: str
) -> None:
    root = bucket.removesuffix("/runs")
    for name in ("a.jsonl", "b.jsonl"):
        storage.write_bytes(f"{root}/data/{name}", (tmp_path / name).read_bytes())
    sources = [{"path": f"{root}/data/a.jsonl"}, {"path": f"{root}/data/b.jsonl", "weight": 2.0}]
    fields = [
        source.model_dump() | there
        for source, there in zip(corpus.data.train, sources, strict=True)
    ]
    local = prepare(corpus, tiny_spec, "train")
    remote = prepare(
        override(corpus, {"run.storage": bucket, "data.train": fields}), tiny_spec, "train"
    )
    assert remote.digest == local.digest
    shards = [shard_name(number) for number in range(12)]
    assert all(
        storage.read_bytes(f"{remote.uri}/{n}") == Path(local.uri, n).read_bytes() for n in shards
    )
    assert all(
        (remote[index].input_ids == local[index].input_ids).all() for index in range(len(local))
    )


@pytest.mark.parametrize("damage", ["truncated", "missing", "changed"])
def test_a_damaged_shard_is_named(damage: str, corpus: Config, tiny_spec: TokenizerSpec) -> None:
    store = prepare(corpus, tiny_spec, "train")
    path = Path(store.uri, "shard-00002.arrow")
    before = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            before[:-100] if damage == "truncated" else before[:1000] + b"\xff" + before[1001:]
        )
    with pytest.raises(UserError):
        TokenStore.open(store.uri)[sum(shard.packs for shard in store.manifest.shards[:2])]


def test_a_damaged_manifest_is_an_error(corpus: Config, tiny_spec: TokenizerSpec) -> None:
    store = prepare(corpus, tiny_spec, "train")
    Path(store.uri, "manifest.json").write_text('{"digest": 1}')
    with pytest.raises(UserError):
        TokenStore.open(store.uri)
    with pytest.raises(UserError):
        TokenStore.open(f"{store.uri}/nothing")


def failure(config: Config, spec: TokenizerSpec, split: Any = "train") -> str:
    with pytest.raises(UserError) as caught:
        prepare(config, spec, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_too_many_bad_rows_stop_the_run_with_counts_and_examples(
    tmp_path: Path, tiny_spec: TokenizerSpec
) -> None:
    path = helpers.write_jsonl(
        tmp_path / "a.jsonl", [*rows(90), *[chat("q", "")] * 4, chat("q" * 200, "a")]
    )
    with path.open("a") as file:
        file.write('{"messages": [}\n')
    config = helpers.config(tmp_path / "runs", path)
    message = failure(config, tiny_spec)
    assert message.startswith(
        "data.train.0: 6 of 96 rows cannot be used, more than data.max_rejected = 0.01 allows"
        f" (broken_json 1, empty_answer 4, too_long 1); {path}:"
    )
    assert message.count(f"{path}:") == 3
    assert message.endswith("; fix or remove them, or allow them with data.max_rejected=0.063")
    [listed] = (tmp_path / "runs/tokens").glob("*/rejected.jsonl")
    entries = [json.loads(line) for line in listed.read_text().splitlines()]
    assert {(entry["line"], entry["reason"]) for entry in entries} == {
        *((line, "empty_answer") for line in (91, 92, 93, 94)),
        (95, "too_long"),
        (96, "broken_json"),
    }
    assert all(entry["file"] == str(path) and entry["message"] for entry in entries)
    allowed = helpers.config(tmp_path / "runs", path, max_rejected=0.1)
    assert prepare(allowed, tiny_spec, "train").manifest.rejected == {
        "broken_json": 1,
        "empty_answer": 4,
        "too_long": 1,
    }
    # A stricter limit also applies to the same store once it is complete.
    assert failure(config, tiny_spec) == message


def test_one_row_that_the_template_refuses_does_not_stop_the_run(tmp_path: Path) -> None:
    # The row has two answers in a row, but the template wants alternating roles.
    strict = (
        "{% if messages | length > 2 %}{{ raise_exception('roles must alternate') }}{% endif %}"
        + helpers.CHATML
    )
    odd = {"messages": [*chat("q", "a")["messages"], {"role": "assistant", "content": "b"}]}
    path = helpers.write_jsonl(tmp_path / "a.jsonl", [*rows(120), odd])
    store = prepare(helpers.config(tmp_path, path), helpers.spec(strict), "train")
    assert store.manifest.rejected == {"template": 1}
    [entry] = map(json.loads, Path(store.uri, "rejected.jsonl").read_text().splitlines())
    assert (entry["file"], entry["line"]) == (str(path), 121)
    assert entry["message"].startswith(
        "the chat template of tiny refuses the conversation: roles must alternate"
    )


def test_nothing_held_out(tmp_path: Path, tiny_spec: TokenizerSpec) -> None:
    path = helpers.write_jsonl(tmp_path / "a.jsonl", rows(3))
    config = helpers.config(tmp_path / "runs", path, eval_fraction=0.001)
    assert "no row is left for eval (data.eval_fraction = 0.001)" in failure(
        config, tiny_spec, "eval"
    )
    assert "data.eval: no source is set" in failure(
        helpers.config(tmp_path, path), tiny_spec, "eval"
    )


@pytest.mark.ray
@pytest.mark.parametrize(("cpus", "tasks"), [(4, 4000), pytest.param(1, 3, marks=pytest.mark.slow)])
def test_any_number_of_cpus_and_tasks_gives_the_same_bytes(
    cpus: int,
    tasks: int,
    corpus: Config,
    tiny_spec: TokenizerSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spread: Callable[..., None],
) -> None:
    here = prepare(corpus, tiny_spec, "train")
    expected = content(here.uri)
    monkeypatch.setattr("olora_ray.tokens.spread.TASKS", tasks)
    spread(cpus, scans=True)
    run = corpus.run.model_copy(update={"storage": str(tmp_path / "spread")})
    with said() as lines:
        store = prepare(corpus.model_copy(update={"run": run}), tiny_spec, "train")
    assert store.digest == here.digest
    assert content(store.uri) == expected
    assert any("of 12 shards, fill 0.9" in line and "rows/s, ETA" in line for line in lines)
    # Bad input reaches the user as the same one line through Ray's tasks.
    Path(corpus.data.train[0].path).write_text('{"x": 1}\n' * 500)
    assert failure(corpus, tiny_spec).startswith("data.train.0: ")
    Path(corpus.data.train[0].path).rename(tmp_path / "c.jsonl.gz")
    broken = helpers.config(tmp_path / "runs", tmp_path / "c.jsonl.gz", tmp_path / "b.jsonl")
    assert "c.jsonl.gz: not a readable gzip file" in failure(broken, tiny_spec)


def test_a_row_that_is_far_too_long_is_rejected_before_it_is_tokenised(
    tmp_path: Path, tiny_spec: TokenizerSpec
) -> None:
    # A csv cell of 60 MB took 88 seconds and 11 GB.
    for letters, reason in (
        (8000, "tokens, more than data.max_length = 8"),
        (8001, "more than 8,000 characters"),
    ):
        row = {"prompt": "q" * letters, "completion": "a"}
        source = {
            "path": str(helpers.write_jsonl(tmp_path / "a.jsonl", [row])),
            "format": "prompt_completion",
        }
        told = failure(
            helpers.config(tmp_path / "runs", {**source, "chat": False}, max_length=8),
            tiny_spec,
            "train",
        )
        assert "too_long: " in told
        assert reason in told
