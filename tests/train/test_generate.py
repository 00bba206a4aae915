"""A held-out prompt reaches the model as in serving, with the tokens of the training.

Answers are greedy.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from olora_ray.data.tokenizer_spec import spec_from_pretrained
from olora_ray.model.load import load_model
from olora_ray.tokens.prepare import prepare
from olora_ray.train.generate import decoding, greedy, questions
from tests import tiny
from tests.data import small_tokenizers
from tests.families import zoo
from tests.families.variants import ALL
from tests.tokens import helpers

CPU = torch.device("cpu")

ROWS = [
    {"prompt": "Sentiment: ", "completion": "positive"},
    {"prompt": "two blanks  ", "completion": "  hello"},
    {"prompt": "Answer:\n", "completion": "\n42"},
    {"prompt": "e", "completion": "\u0301te\u0301 😀"},
]


@pytest.mark.parametrize(
    "kind", ["byte-level", "byte-level-trimmed", "byte-level-nfc", "metaspace-always", "prepend"]
)
@pytest.mark.parametrize("chat", [True, False])
def test_questions_are_what_a_server_makes_of_the_prompt(
    kind: str, chat: bool, tmp_path: Path
) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=small_tokenizers.tokenizer(kind),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    tokenizer.chat_template = helpers.CHATML
    path = helpers.write_jsonl(tmp_path / "a.jsonl", ROWS)
    source = {"path": str(path), "format": "prompt_completion", "chat": chat}
    config = helpers.config(tmp_path / "runs", source, eval=[source], max_length=200)
    asked = questions(prepare(config, spec_from_pretrained(tokenizer, kind), "eval"), 10)
    if chat:
        turns = [[{"role": "user", "content": row["prompt"]}] for row in ROWS]
        wanted = [
            tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
            for turn in turns
        ]
    else:
        wanted = [tokenizer(row["prompt"])["input_ids"] for row in ROWS]
        # An example whose prompt is one token looks like plain text: it is not asked.
        wanted = [ids for ids in wanted if len(ids) > 1]
    assert sorted(question.prompt for question in asked) == sorted(map(tuple, wanted))
    assert all(tokenizer.decode(question.reference, skip_special_tokens=True) for question in asked)


@pytest.mark.parametrize(
    "own",
    [
        {"repetition_penalty": 5.0},
        {"num_beams": 4, "length_penalty": 2.0},
        {"no_repeat_ngram_size": 1},
        {"guidance_scale": 5.0},
        {"suppress_tokens": list(range(0, tiny.VOCABULARY, 2))},
        {"forced_eos_token_id": 1},
    ],
    ids=lambda own: next(iter(own)),
)
def test_answers_are_greedy_whatever_generation_config_says(
    own: dict[str, Any], tmp_path: Path
) -> None:
    zoo.build(ALL["llama"], tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(own))
    config = tiny.decided(model__name=str(tmp_path), model__dtype="float32").model
    model = load_model(tmp_path, config, CPU)
    prompts = [tuple(range(5, 14)), (7, 8, 9)]
    with decoding(model):
        found = greedy(model, prompts, 8, [], CPU)
        assert found == [likeliest(model, prompt, 8) for prompt in prompts]
    assert model.generation_config.to_dict().items() >= own.items(), "they are the model's again"
    assert found[0] != its_own_way(model, prompts[0], 8), "what this is about"


def test_answers_end_where_the_positions_of_a_model_end() -> None:
    model = tiny.gpt2()  # has 128
    prompts = [tuple(range(2, 92)) + tuple(range(2, 38)), (7, 8, 9)]
    assert len(prompts[0]) == 126
    with decoding(model):
        found = greedy(model, prompts, 8, [], CPU)
        assert found == [likeliest(model, prompt, 3) for prompt in prompts]
        assert greedy(model, prompts[1:], 8, [], CPU) == [likeliest(model, prompts[1], 8)]


def test_a_model_that_takes_padding_for_text_is_given_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.make(ALL["recurrent_gemma"])  # its convolutions see what stands before a prompt
    masks, generate = [], model.generate
    monkeypatch.setattr(
        model,
        "generate",
        lambda **given: masks.append(given["attention_mask"]) or generate(**given),
    )
    prompts = [(7, 8, 9), tuple(range(5, 14)), (9, 8, 7)]
    with decoding(model):
        found = greedy(model, prompts, 4, [], CPU)
        assert [mask.shape for mask in masks] == [(2, 3), (1, 9)]
        assert all(mask.all() for mask in masks)
        assert found == [greedy(model, [prompt], 4, [], CPU)[0] for prompt in prompts]


def likeliest(model: Any, prompt: tuple[int, ...], tokens: int) -> list[int]:
    """Decode without a cache, padding or transformers' generate."""
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(
            int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        )
    return ids[len(prompt) :]


def its_own_way(model: Any, prompt: tuple[int, ...], tokens: int) -> list[int]:
    """Generate with transformers' defaults, except for sampling."""
    ids = torch.tensor([prompt])
    model.set_attn_implementation("sdpa")
    made = model.generate(input_ids=ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None)
    answer: list[int] = made[0, len(prompt) :].tolist()
    return answer
