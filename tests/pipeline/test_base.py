"""A model folder needs a tokenizer."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from olora_ray.config.load import build
from olora_ray.data import chat_template
from olora_ray.model.source import BaseModel
from olora_ray.pipeline.base import open_base, with_tokenizer
from tests import tiny
from tests.export_parts import save_tokenizer
from tests.pipelines import project
from tests.refused import refused
from tests.said import said


def test_a_folder_without_a_tokenizer_says_what_is_missing(tmp_path: Path) -> None:
    config = build(
        {"run": {"name": "a"}, "model": {"name": str(tmp_path)}, "data": {"train": "a.jsonl"}}
    )
    base = BaseModel(str(tmp_path), str(tmp_path), "")
    tiny.llama().config.save_pretrained(tmp_path)
    with refused("has no tokenizer"):
        with_tokenizer(base, config)
    save_tokenizer(tmp_path)
    assert with_tokenizer(base, config).eos == (1,)


def test_what_ends_an_answer_in_chats_ends_answers(tmp_path: Path) -> None:
    folder = project.make_model(tmp_path / "model")  # its template ends turns with <|end|>, token 0
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"eos_token": "<|system|>"})
    )
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    config = build(project.settings(tmp_path, folder))
    with said() as lines:
        assert open_base(config).eos == (0, 1)
    assert len([line for line in lines if "stop token" in line]) == 1
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    with said() as lines:
        assert open_base(config).eos == (0, 1)
    assert not [line for line in lines if "stop token" in line]


def test_files_that_do_not_fit_the_config_are_told_before_anything_is_prepared(
    tmp_path: Path,
) -> None:
    folder = project.make_model(tmp_path / "model")
    config, file = build(project.settings(tmp_path, folder)), folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"mtp.proj.weight": torch.ones(2, 2)}, file)
    with said() as lines:
        open_base(config)
    [line] = [line for line in lines if "does not use" in line]
    assert line.endswith("mtp.proj.weight")
    save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, file)
    with refused("model.name"):
        open_base(config)
    for missing in ("model.layers.0.self_attn.q_proj.weight", "model.norm.weight"):
        save_file({name: tensor for name, tensor in tensors.items() if name != missing}, file)
        with refused("model.name"):
            open_base(config)


BOTS = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|end|>\n' }}{% endfor %}{{ 'assistant: ' if x }}"


@pytest.mark.parametrize("own", [True, False])
def test_a_template_of_ones_own_takes_the_place_of_the_models(own: bool, tmp_path: Path) -> None:
    folder, file = project.make_model(tmp_path / "model"), tmp_path / "own.jinja"
    if not own:
        (folder / "chat_template.jinja").unlink()
    file.write_text(BOTS)
    digests = set()
    for name, source in ((None, None), (str(file), BOTS), ("plain", chat_template.DEFAULT)):
        base = open_base(build(project.settings(tmp_path, folder, data__chat_template=name)))
        assert base.spec.has_template == (own or name is not None)
        assert base.spec.chat_template == base.tokenizer.chat_template or not (own or name)
        assert source in (None, base.spec.chat_template)
        digests.add(base.spec.digest)
    assert len(digests) == (3 if own else 2), "part of the identity of the tokens"


@pytest.mark.parametrize("content", [None, b"{% for x in", b"\x89PNG\r\n"])
def test_a_template_that_cannot_be_read_is_one_line(content: bytes | None, tmp_path: Path) -> None:
    folder, file = project.make_model(tmp_path / "model"), tmp_path / "own.jinja"
    if content is not None:
        file.write_bytes(content)
    with refused("data.chat_template"):
        open_base(build(project.settings(tmp_path, folder, data__chat_template=str(file))))
