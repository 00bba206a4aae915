"""A store is read while it is built."""

import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from olora_ray.common import fault_points
from olora_ray.common.errors import UserError
from olora_ray.config.schema import Config
from olora_ray.data.tokenizer_spec import TokenizerSpec
from olora_ray.tokens.arrival import Arrival
from olora_ray.tokens.plan import Pack
from olora_ray.tokens.prepare import begin, prepare
from olora_ray.tokens.store import TokenStore
from tests.said import said
from tests.tokens import helpers
from tests.tokens.helpers import content, rows

# Seconds after which a test counts as hung.
LIMIT = 120.0


def same(one: Pack, other: Pack) -> bool:
    return (
        one.segments == other.segments
        and (one.input_ids == other.input_ids).all()
        and bool((one.supervised == other.supervised).all())
    )


@pytest.fixture
def made(corpus: Config, tiny_spec: TokenizerSpec, tmp_path: Path) -> TokenStore:
    """The complete store, in another folder."""
    run = corpus.run.model_copy(update={"storage": str(tmp_path / "made")})
    return prepare(corpus.model_copy(update={"run": run}), tiny_spec, "train")


def put(made: TokenStore, store: TokenStore, *names: str) -> None:
    """Copy files of the complete store."""
    folder = Path(store.uri)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(Path(made.uri, name).read_bytes())


def test_what_is_there_at_the_front_is_known(
    corpus: Config, tiny_spec: TokenizerSpec, made: TokenStore
) -> None:
    preparation = begin(corpus, tiny_spec, "train")
    store = preparation.store
    assert (preparation.complete, preparation.problem) == (False, None)
    assert (store.complete, len(store), store.total, store.shard_count) == (False, 0, None, 12)
    assert store.digest == made.digest
    sizes = [shard.packs for shard in made.manifest.shards]
    for names, shards in (
        (["shard-00000.arrow"], 0),  # not finished
        (["shard-00000.json"], 1),
        (["shard-00002.arrow", "shard-00002.json"], 1),  # not at the front
        (["shard-00001.arrow", "shard-00001.json"], 3),
    ):
        put(made, store, *names)
        store.look()
        assert (len(store.front.shards), len(store)) == (shards, sum(sizes[:shards]))
    known = range(len(store))
    assert all(same(store[index], made[index]) for index in known)
    assert store.counts(known) == made.counts(known)
    assert [store.origins(index) for index in known] == [made.origins(index) for index in known]
    assert store.locate(sizes[0]) == (1, 0, sizes[1])
    with pytest.raises(IndexError):
        store[len(store)]
    with pytest.raises(UserError):
        _ = store.manifest


def test_a_growing_store_travels_and_becomes_complete(
    corpus: Config, tiny_spec: TokenizerSpec, made: TokenStore
) -> None:
    store = begin(corpus, tiny_spec, "train").store
    put(made, store, "shard-00000.arrow", "shard-00000.json")
    assert store.has(1)
    elsewhere: Arrival = pickle.loads(pickle.dumps(store))
    assert (len(elsewhere), elsewhere.digest, elsewhere.shard_count) == (
        len(store),
        store.digest,
        12,
    )
    put(made, store, *(name for name in content(made.uri) if name != "manifest.json"))
    elsewhere.look()
    assert (elsewhere.total, elsewhere.complete, len(elsewhere)) == (len(made), False, len(made))
    put(made, store, "manifest.json")
    elsewhere.look()
    assert elsewhere.complete
    assert elsewhere.manifest.shards == made.manifest.shards
    assert all(same(elsewhere[index], made[index]) for index in range(len(made)))
    assert pickle.loads(pickle.dumps(elsewhere)).complete


def test_start_gives_the_same_store_as_prepare(
    corpus: Config, tiny_spec: TokenizerSpec, made: TokenStore
) -> None:
    preparation = begin(corpus, tiny_spec, "train")
    preparation.start()
    preparation.join()
    assert preparation.store.manifest.packs == len(made)
    assert content(preparation.store.uri) == content(made.uri)
    again = begin(corpus, tiny_spec, "train")
    assert again.complete
    assert again.store.complete
    again.run()


def test_a_stopped_preparation_is_finished_by_the_next(
    corpus: Config, tiny_spec: TokenizerSpec, made: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    preparation = begin(corpus, tiny_spec, "train")

    def stop(point: str, step: int | None, rank: int | None) -> None:
        if step == 4:
            preparation.stop()

    monkeypatch.setattr(fault_points, "handler", stop)
    preparation.start()
    preparation.join()
    assert preparation.problem is None
    wanted = {name for n in range(5) for name in (f"shard-{n:05d}.arrow", f"shard-{n:05d}.json")}
    assert set(content(preparation.store.uri)) == wanted
    with said() as lines:
        assert content(prepare(corpus, tiny_spec, "train").uri) == content(made.uri)
    assert any("5 of 12 shards exist already" in line for line in lines)


def test_a_problem_ends_the_work_and_is_passed_on(
    tmp_path: Path, tiny_spec: TokenizerSpec, small_shards: None
) -> None:
    path = helpers.write_jsonl(tmp_path / "a.jsonl", [*rows(400), *[{"x": 1}] * 100])
    preparation = begin(helpers.config(tmp_path / "runs", path), tiny_spec, "train")
    preparation.start()
    with pytest.raises(UserError):
        preparation.join()
    assert isinstance(preparation.problem, UserError)
    assert not preparation.store.complete


@pytest.mark.ray
@pytest.mark.parametrize(
    ("taken", "cpus_held"),
    [
        pytest.param(None, 0, marks=pytest.mark.slow, id="a free CPU"),
        pytest.param("before", 0, id="another run's"),
        pytest.param("after", 1, marks=pytest.mark.slow, id="soon this run's"),
        pytest.param("after", 0, marks=pytest.mark.slow, id="soon another run's"),
    ],
)
def test_a_reader_follows_ray_datas_shards_whoever_has_the_cpu(
    taken: str | None,
    cpus_held: int,
    corpus: Config,
    tiny_spec: TokenizerSpec,
    made: TokenStore,
    spread: Callable[..., None],
) -> None:
    import ray

    spread(1)
    threads = set(threading.enumerate())
    preparation = begin(corpus, tiny_spec, "train")
    if taken == "before":
        assert ray.util.placement_group([{"CPU": 1}]).wait(LIMIT)
    preparation.start(cpus_held)
    if taken == "after":
        time.sleep(0.5)  # the tasks start later
        assert ray.util.placement_group([{"CPU": 1}]).wait(LIMIT)
    store: Arrival = pickle.loads(pickle.dumps(preparation.store))
    deadline, seen, index = time.monotonic() + LIMIT, set(), 0
    while not store.complete:
        assert time.monotonic() < deadline, preparation.problem
        store.look()
        seen.add(len(store.front.shards))
        for index in range(index, len(store)):  # noqa: B020 - it continues where it was
            assert same(store[index], made[index])
        time.sleep(0.02)
    preparation.join()
    assert index == len(made) - 1
    assert len(seen) > 2  # it was there in parts
    assert content(store.uri) == content(made.uri)
    assert "tokens" not in {thread.name for thread in set(threading.enumerate()) - threads}
