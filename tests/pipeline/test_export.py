"""A base without a chat template that was trained on chats is exported with the template that they had."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from olora_ray.data import chat_template
from olora_ray.model.load import end_tokens, load_tokenizer
from olora_ray.model.source import BaseModel
from olora_ray.pipeline.export import PARITY_TOKENS, _held_out, give_template, more_ends
from tests import tiny
from tests.data import small_tokenizers


def exported(folder: Path, begin: bool, **source: Any) -> str | None:
    """The template of the merged folder of a base whose tokenizer has none."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    inner = small_tokenizers.byte_level(False)
    if begin:
        inner.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))])
    for name in ("base", "merged"):
        tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
        tokenizer.save_pretrained(folder / name)
    config = tiny.config(data__train=[{"path": "x.jsonl", **source}])
    give_template(config, BaseModel("tiny", str(folder / "base"), ""), folder / "merged")
    file = folder / "merged" / "chat_template.jinja"
    return file.read_text() if file.is_file() else None


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("source", [{}, {"format": "prompt_completion", "chat": True}])
def test_chats_get_the_template_that_was_trained(begin: bool, source: dict[str, Any], tmp_path: Path) -> None:
    found = exported(tmp_path, begin, **source)
    assert found == "{{ bos_token }}" * begin + chat_template.DEFAULT


@pytest.mark.parametrize("source", [{"format": "text"}, {"format": "prompt_completion"}])
def test_texts_get_none(source: dict[str, Any], tmp_path: Path) -> None:
    assert exported(tmp_path, False, **source) is None


@pytest.mark.parametrize(
    ("lengths", "taken"),
    [((100, 100, 100), [100, 100]), ((3000, 10), [PARITY_TOKENS]), ((PARITY_TOKENS, 1), [PARITY_TOKENS])],
)
def test_logits_are_of_few_tokens_however_long_examples_are(lengths: tuple[int, ...], taken: list[int]) -> None:
    item = tiny.pack(*lengths)
    store: Any = tiny.ListStore([item, tiny.pack(5)])
    found = _held_out(store)
    assert [ids.shape for ids in found] == [(1, size) for size in taken]
    assert found[0][0].tolist() == item.input_ids[: taken[0]].tolist()


def test_what_ends_answers_beyond_the_bases_own_files_is_named(tmp_path: Path) -> None:
    exported(tmp_path, False)
    spec: Any = SimpleNamespace(config=tiny.config(), eos=(0, 1, 2))
    base = BaseModel("tiny", str(tmp_path / "base"), "")
    ends = end_tokens(base, load_tokenizer(base, spec.config.model))
    assert [f"({token})" in more_ends(spec, base) for token in spec.eos] == [token not in ends for token in spec.eos]
    spec.eos = ends
    assert more_ends(spec, base) == ""


def test_mistrals_own_form_of_a_tokenizer_does_not_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its package is installed, the same folder had another tokenizer than elsewhere, or none."""
    exported(tmp_path, False)
    asked: list[Any] = []
    old = AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **named: asked.append(named) or old(*a, **named))
    load_tokenizer(BaseModel("tiny", str(tmp_path / "base"), ""), tiny.config().model)
    assert asked[0]["mistral_format"] is False
