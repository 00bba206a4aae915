"""A GGUF file whose header does not fit the file is refused before a reader believes it."""

import struct
import time
from pathlib import Path

import pytest

from olora_ray.common.errors import UserError
from olora_ray.model import gguf_header, source
from tests import tiny
from tests.model import small_gguf


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    pytest.importorskip("gguf")
    return small_gguf.write(tmp_path_factory.mktemp("gguf") / "whole.gguf").read_bytes()


def obtain(folder: Path, content: bytes) -> source.BaseModel:
    (folder / "model.gguf").write_bytes(content)
    return source.obtain(tiny.config(model__name=str(folder / "model.gguf"), run__storage=str(folder / "runs")))


def value_of(content: bytes, key: str) -> int:
    """Where the value of a key stands: behind its name and its type."""
    return content.index(key.encode()) + len(key) + 4


def with_number(content: bytes, place: int, kind: str, number: int) -> bytes:
    packed = struct.pack(f"<{kind}", number)
    return content[:place] + packed + content[place + len(packed) :]


def test_a_whole_file_is_converted(whole: bytes, tmp_path: Path) -> None:
    base = obtain(tmp_path, whole)
    assert (Path(base.folder) / "model.safetensors").is_file()
    assert (Path(base.folder) / "tokenizer.json").is_file()
    assert obtain(tmp_path, whole) == base


@pytest.mark.parametrize(
    ("key", "kind", "number", "problem"),
    [
        ("llama.block_count", "I", 0x4E000001, "llama.block_count is 1308622849, but its tensors have 1 blocks"),
        ("llama.block_count", "I", 2, "llama.block_count is 2, but its tensors have 1 blocks"),
        ("llama.embedding_length", "I", 2**31, "llama.embedding_length is 2147483648, but"),
        ("llama.feed_forward_length", "I", 2**30, "llama.feed_forward_length is 1073741824, but"),
        ("llama.context_length", "I", 2**32 - 1, "llama.context_length cannot be 4294967295"),
        ("llama.context_length", "Q", 2**64 - 1, ""),
        ("tokenizer.ggml.tokens", "I", 77, "a list of values of type 77"),
        ("general.architecture", "Q", 2**63, "it counts 9,223,372,036,854,775,808 letters of a text, more than fit"),
        ("blk.0.attn_q.weight", "Q", 2**63, ""),
    ],
)
def test_a_number_that_cannot_be_is_named_at_once(
    whole: bytes, tmp_path: Path, key: str, kind: str, number: int, problem: str
) -> None:
    changed = with_number(whole, value_of(whole, key), kind, number)
    begun = time.process_time()
    with pytest.raises(UserError, match=r"model\.gguf is not a GGUF model that loads: ") as caught:
        obtain(tmp_path, changed)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.process_time() - begun < 20
    assert not (tmp_path / "runs" / "models").exists() or not list((tmp_path / "runs" / "models").glob("model-*"))


@pytest.mark.parametrize(("place", "what"), [(8, "tensors"), (16, "values")])
@pytest.mark.parametrize("count", [2**63, 2**64 - 1, 10**6])
def test_counts_are_compared_with_the_size_of_the_file(
    whole: bytes, tmp_path: Path, place: int, what: str, count: int
) -> None:
    (tmp_path / "model.gguf").write_bytes(with_number(whole, place, "Q", count))
    with pytest.raises(UserError, match=f"it counts {count:,} {what}, more than fit"):
        gguf_header.check(tmp_path / "model.gguf")


@pytest.mark.parametrize("length", [0, 3, 4, 8, 24, 100, 2000, -1, -5000])
def test_a_file_that_is_cut_off_says_so(whole: bytes, tmp_path: Path, length: int) -> None:
    (tmp_path / "model.gguf").write_bytes(whole[:length])
    with pytest.raises(UserError, match=r"model\.gguf is not a GGUF model that loads: it "):
        gguf_header.check(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("name", "offset", "kind", "number", "problem"),
    [
        ("blk.0.attn_q.weight", 0, "I", 99, "has 99 dimensions"),
        ("blk.0.attn_q.weight", 4, "Q", 2**62, "is cut off|cannot have the dimensions"),
        ("blk.0.attn_q.weight", 20, "I", 77, "has numbers of type 77, which is not known"),
        ("blk.0.attn_q.weight", 24, "Q", 2**60, "is cut off"),
    ],
)
def test_a_tensor_lies_within_the_file(
    whole: bytes, tmp_path: Path, name: str, offset: int, kind: str, number: int, problem: str
) -> None:
    place = whole.index(name.encode()) + len(name) + offset
    (tmp_path / "model.gguf").write_bytes(with_number(whole, place, kind, number))
    with pytest.raises(UserError, match=problem):
        gguf_header.check(tmp_path / "model.gguf")
