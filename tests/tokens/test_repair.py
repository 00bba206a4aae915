"""A file that a crash or a disk has damaged is rebuilt with the same bytes, or named; it never gives wrong data."""

import multiprocessing
import os
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olora_ray.common import records
from olora_ray.common.errors import TryAgain, UserError
from olora_ray.config.schema import Config
from olora_ray.data.tokenizer_spec import TokenizerSpec
from olora_ray.tokens import plan
from olora_ray.tokens import prepare as writer
from olora_ray.tokens.arrival import Arrival
from olora_ray.tokens.prepare import plan_here, prepare
from olora_ray.tokens.store import TokenStore
from tests.tokens import helpers
from tests.tokens.helpers import chat, content, rows
from tests.tokens.test_growing import same
from tests.waiting import until

# New content of files; None: the file is missing.
Damage = dict[str, bytes | None]


def kept(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_shard_that_is_not_what_it_was_is_refused(
    corpus: Config, tiny_spec: TokenizerSpec
) -> None:
    folder = Path(prepare(corpus, tiny_spec, "train").uri)
    tree = records.read(str(folder / "manifest.json"), dict[str, Any], sealed=True)
    assert tree
    tree["shards"][3]["bytes"] += 1
    (folder / "manifest.json").write_text(records.seal(tree))
    (folder / "shard-00003.arrow").unlink()
    for _ in range(2):  # now, and when the next run finds it
        with pytest.raises(
            UserError, match=r"rebuilt shard-00003\.arrow differs from the original"
        ):
            prepare(corpus, tiny_spec, "train")


def _prepare_in_a_process(storage: str, source: str, start: Any, answers: Any) -> None:
    plan.SHARD_ROWS = (64, 64)
    config = helpers.config(Path(storage), source)
    start.wait(30)
    answers.put(prepare(config, helpers.spec(), "train").digest)


def test_two_processes_at_the_same_time(
    tmp_path: Path, tiny_spec: TokenizerSpec, small_shards: None
) -> None:
    source = helpers.write_jsonl(tmp_path / "a.jsonl", [*rows(400), {"x": 1}])
    alone = prepare(helpers.config(tmp_path / "alone", source), tiny_spec, "train")
    context = multiprocessing.get_context("spawn")
    start, answers = context.Barrier(2), context.Queue()
    job = (str(tmp_path / "shared"), str(source), start, answers)
    processes = [context.Process(target=_prepare_in_a_process, args=job) for _ in range(2)]
    for process in processes:
        process.start()
    digests = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert digests == [alone.digest] * 2
    assert content(f"{tmp_path}/shared/tokens/{alone.digest}") == content(alone.uri)


def test_processes_of_the_driver_give_the_bytes_of_one_and_a_killed_one_is_told(
    tmp_path: Path, tiny_spec: TokenizerSpec
) -> None:
    config = large(tmp_path)
    job = writer.StoreSpec(
        plan_here(config, tiny_spec, "train"), str(tmp_path / "alone"), str(tmp_path)
    )
    for number in range(2):
        writer.make_shard(job.for_tasks(), job.plan.part(number))
    expected = content(job.uri)
    assert len(expected) == 2 * 2

    others = servants()
    killer = threading.Thread(target=until, args=[partial(killed, others), 30, 0.001], daemon=True)
    killer.start()
    with pytest.raises(
        TryAgain, match="a process that tokenised rows was killed; run the same command again"
    ):
        prepare(config, tiny_spec, "train")
    killer.join()
    until(lambda: servants() <= others)

    found = content(prepare(config, tiny_spec, "train").uri)
    assert found.items() >= expected.items()


def large(folder: Path) -> Config:
    """Rows for which the driver starts processes."""
    long = [chat(f"question {number} " * 20, f"answer {number} " * 20) for number in range(9000)]
    return helpers.config(
        folder / "runs", helpers.write_jsonl(folder / "long.jsonl", long), max_length=1024
    )


def servants() -> set[psutil.Process]:
    """Processes that a server of this process has forked; other tests have some, too."""
    servers = [
        each for each in psutil.Process().children() if "forkserver" in " ".join(each.cmdline())
    ]
    return {each for server in servers for each in server.children()}


def killed(others: set[psutil.Process]) -> bool:
    for each in (ours := servants() - others):
        each.kill()
    return bool(ours)


class Small:
    """A complete store of three shards, and a fresh copy of it for each example."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        source = helpers.write_jsonl(folder / "a.jsonl", [*rows(60), {"x": 1}])
        os.utime(source, (5, 5))  # a scan is not kept of a file that was changed a moment ago
        self.config = helpers.config(folder / "runs", source, max_rejected=0.5)
        self.store = prepare(self.config, helpers.spec(), "train")
        self.files = content(self.store.uri)
        self.packs = [self.store[index] for index in range(len(self.store))]
        self.origins = [self.store.origins(index) for index in range(len(self.store))]

    def damaged(self, damage: Damage) -> None:
        shutil.rmtree(self.store.uri)
        Path(self.store.uri).mkdir()
        for name, found in {**self.files, **damage}.items():
            if found is not None:
                Path(self.store.uri, name).write_bytes(found)

    def check(self, store: TokenStore, known: int) -> None:
        # Every sequence is right, or reading it is a UserError.
        for index in range(known):
            try:
                found, origins = store[index], store.origins(index)
            except UserError:
                continue
            assert same(found, self.packs[index])
            assert origins == self.origins[index]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SHARD_ROWS", (16, 16))
        patch.setattr("os.fsync", lambda handle: None)
        found = Small(tmp_path_factory.mktemp("small"))
        assert len(found.store.manifest.shards) == 4
        yield found


def broken(content: bytes, data: st.DataObject) -> bytes | None:
    """The content truncated, with some bytes changed, or missing."""
    kind = data.draw(st.sampled_from(["gone", "truncated", "changed", "changed"]))
    if kind == "gone":
        return None
    if kind == "truncated" or not content:
        return content[: data.draw(st.integers(0, max(0, len(content) - 1)))]
    changed = bytearray(content)
    for place in data.draw(
        st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3, unique=True)
    ):
        changed[place] ^= data.draw(st.integers(1, 255))
    return bytes(changed)


NAMES = st.sampled_from(
    [
        "manifest.json",
        "rejected.jsonl",
        *(f"shard-0000{n}.{kind}" for n in range(3) for kind in ("arrow", "json")),
    ]
)


@settings(max_examples=150)
@given(st.data(), st.lists(NAMES, min_size=1, max_size=3, unique=True), st.booleans())
def test_damage_never_gives_wrong_data(
    small: Small, data: st.DataObject, names: list[str], killed: bool
) -> None:
    damage: Damage = {name: broken(small.files[name], data) for name in names}
    if killed:
        damage["manifest.json"] = None
    small.damaged(damage)
    growing = Arrival(small.store.uri, small.store.manifest.outline())
    growing.look()
    small.check(growing, len(growing))
    try:
        store = prepare(small.config, helpers.spec(), "train")
    except UserError:
        return
    assert store.manifest == small.store.manifest
    small.check(store, len(store))
    # The start does not check the bytes of a shard of the right size, nor sidecars of a complete store.
    unseen = {name for name in names if name.startswith("shard")}
    found = content(store.uri)
    assert {name for name in found if found[name] != small.files.get(name)} <= unseen
    if any(found[name] != small.files[name] for name in unseen if name.endswith("arrow")):
        with pytest.raises(UserError):
            _ = [store[index] for index in range(len(store))]
