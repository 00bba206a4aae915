"""A model folder needs a tokenizer."""

from pathlib import Path

import pytest

from olora_ray.common.errors import UserError
from olora_ray.config.load import build
from olora_ray.model.source import BaseModel
from olora_ray.pipeline.base import with_tokenizer
from tests.export_parts import save_tokenizer


def test_a_folder_without_a_tokenizer_says_what_is_missing(tmp_path: Path) -> None:
    config = build({"run": {"name": "a"}, "model": {"name": str(tmp_path)}, "data": {"train": "a.jsonl"}})
    base = BaseModel(str(tmp_path), str(tmp_path), "")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no tokenizer: none of tokenizer\.json, .* is there; copy the files"):
        with_tokenizer(base, config)
    save_tokenizer(tmp_path)
    (tmp_path / "config.json").unlink()
    assert with_tokenizer(base, config).eos == (1,)
