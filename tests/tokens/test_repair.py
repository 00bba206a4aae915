"""A file that a crash or a disk has damaged is rebuilt with the same bytes, or named; it never gives wrong data."""

import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
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
from olora_ray.tokens.prepare import begin, plan_here, prepare
from olora_ray.tokens.spread import parallel_map
from olora_ray.tokens.store import TokenStore
from tests.tokens import helpers
from tests.tokens.helpers import chat, content, rows
from tests.tokens.test_growing import same
from tests.waiting import until

# New content of files; None: the file is missing.
Damage = dict[str, bytes | None]


def kept(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("shard-00003.json", "truncated"),
        ("shard-00003.json", "changed"),
        ("shard-00003.arrow", "truncated"),
        ("shard-00003.arrow", "gone"),
        ("manifest.json", "truncated"),
        ("manifest.json", "changed"),
        ("rejected.jsonl", "truncated"),
        ("rejected.jsonl", "changed"),
        ("rejected.jsonl", "gone"),
    ],
)
def test_what_is_damaged_is_made_again_and_nothing_else(
    name: str, damage: str, complete: bool, corpus: Config, tiny_spec: TokenizerSpec
) -> None:
    folder = Path(prepare(corpus, tiny_spec, "train").uri)
    expected, before = content(str(folder)), kept(folder)
    if not complete:
        (folder / "manifest.json").unlink()
    path = folder / name
    if path.exists():
        text = path.read_bytes()
        if damage == "gone":
            path.unlink()
        else:
            # Another digit: still JSON, but other content than was written.
            path.write_bytes(text[:-20] if damage == "truncated" else text.replace(b"1", b"2", 1))
    store = prepare(corpus, tiny_spec, "train")
    if complete and name == "shard-00003.json":  # nothing needs it while the manifest is good
        return
    assert content(store.uri) == expected
    changed = {file for file, at in kept(folder).items() if at != before[file]}
    allowed = {name, "manifest.json", "rejected.jsonl"}
    if name.startswith("shard"):
        allowed |= {"shard-00003.arrow", "shard-00003.json"}
    assert changed <= allowed


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


def test_a_stricter_limit_holds_for_a_store_that_needs_repair(
    tmp_path: Path, tiny_spec: TokenizerSpec
) -> None:
    path = helpers.write_jsonl(tmp_path / "a.jsonl", [*rows(50), {"x": 1}, {"x": 2}])
    folder = prepare(helpers.config(tmp_path, path, max_rejected=0.5), tiny_spec, "train").uri
    Path(folder, "shard-00000.arrow").unlink()
    with pytest.raises(UserError, match="2 of 52 rows cannot be used"):
        prepare(helpers.config(tmp_path, path), tiny_spec, "train")


def test_a_shard_that_was_finished_meanwhile_is_taken(
    corpus: Config, tiny_spec: TokenizerSpec
) -> None:
    preparation = begin(corpus, tiny_spec, "train")  # sees nothing yet
    folder = Path(prepare(corpus, tiny_spec, "train").uri)
    expected, before = content(str(folder)), kept(folder)
    preparation.run()
    assert content(str(folder)) == expected
    assert {name for name, at in kept(folder).items() if at != before[name]} <= {
        "manifest.json",
        "rejected.jsonl",
    }


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


def test_a_script_without_a_guard_may_prepare_too(tmp_path: Path, tiny_spec: TokenizerSpec) -> None:
    (tmp_path / "job").write_bytes(pickle.dumps((large(tmp_path), tiny_spec, "train")))
    script = tmp_path / "script.py"
    script.write_text(
        "import pickle\nfrom olora_ray.tokens.prepare import prepare\n"
        "print(prepare(*pickle.load(open('job', 'rb'))).manifest.rows)\n"
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "9000\n", done.stderr


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


def long_answer(shared: None, item: int) -> bytes:
    return bytes(2**20)  # more than a pipe holds


def test_a_process_that_is_killed_in_its_message_is_told() -> None:
    others, results = servants(), parallel_map(long_answer, None, range(9))
    next(results)
    killed(others)
    with pytest.raises(
        TryAgain, match="a process that tokenised rows was killed; run the same command again"
    ):
        list(results)


def no_answer(shared: None, item: int) -> None:
    raise EOFError("the file ends early")


def test_what_a_process_raises_is_raised() -> None:
    with pytest.raises(EOFError, match="the file ends early"):
        list(parallel_map(no_answer, None, range(2)))


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
        with pytest.raises(UserError, match=r"is damaged; delete it"):
            _ = [store[index] for index in range(len(store))]
