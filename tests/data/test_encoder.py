"""Training sees the tokens of inference: prompts and answers are tokenised apart, with any tokenizer."""

import json
import unicodedata
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from olora_ray.common.errors import UserError
from olora_ray.data.chat_template import ChatTemplate
from olora_ray.data.encoder import Encoder
from olora_ray.data.formats.format import Chat, Completion, Example, Rejected, Text
from olora_ray.data.tokenize import ExampleTokenizer, Tokens
from tests.data import small_tokenizers
from tests.data.test_chat_template import conversation
from tests.tokens import helpers

TEXTS = st.text(st.sampled_from("positve helo.:,123\n\n  \u0301\u0308😀🎉👍🏽é"), max_size=14)
KINDS = st.sampled_from(sorted(small_tokenizers.KINDS))


@lru_cache
def make(kind: str, add_bos: bool = False) -> ExampleTokenizer:
    return ExampleTokenizer(small_tokenizers.spec(kind, add_bos=add_bos), 500)


def plain(kind: str, text: str) -> list[int]:
    """The tokens of the text alone, which a server feeds."""
    return list(small_tokenizers.tokenizer(kind).encode(text, add_special_tokens=False).ids)


def supervised(tokens: Tokens) -> list[int]:
    return tokens.ids[tokens.supervised].tolist()


def read(kind: str, ids: Any) -> str:
    return small_tokenizers.tokenizer(kind).decode(list(ids), skip_special_tokens=False)


def known(kind: str, text: str) -> bool:
    """True if the tokenizer has a token for every character, as byte-level tokenizers have."""
    return small_tokenizers.tokenizer(kind).token_to_id("<unk>") not in plain(kind, text)


@given(KINDS, TEXTS, TEXTS, st.booleans())
@example("byte-level", "Sentiment: ", "positive", False)
@example("byte-level-trimmed", "Sentiment: ", "positive", True)
@example("byte-level-nfc", "e", "\u0301te", False)
@example("metaspace-always", "Sentiment: ", "positive", False)
@example("unigram", "hel", "lo", True)
@example("metaspace-first", "hello", " there", False)
@example("prepend", "hello", " there", False)
@example("prepend", "", "hello", False)
def test_a_prompt_is_what_inference_feeds_and_the_answer_is_what_it_reads(
    kind: str, prompt: str, completion: str, add_bos: bool
) -> None:
    assume(completion.strip() and known(kind, prompt + completion))
    # The only token of an answer must have something before it.
    assume(len(plain(kind, completion)) > 1 or plain(kind, prompt) or add_bos)
    [tokens] = make(kind, add_bos)(Completion(prompt, completion))
    begin = [small_tokenizers.spec(kind).bos_id] if add_bos else []
    asked = [*begin, *plain(kind, prompt)]
    assert tokens.ids.tolist()[: len(asked)] == asked
    assert not tokens.supervised[: len(asked)].any()
    assert tokens.supervised[max(len(asked), 1) :].all()
    assert int(tokens.ids[-1]) == small_tokenizers.spec(kind).eos_id
    answer = tokens.ids[len(asked) : -1].tolist()
    assert len(supervised(tokens)) > 1, "the end token alone"
    whole = read(kind, [*plain(kind, prompt), *answer])
    if kind == "byte-level-nfc":
        completion = unicodedata.normalize("NFC", completion)
    assert whole == read(kind, plain(kind, prompt)) + completion or not plain(kind, prompt)
    if kind.startswith("byte-level"):
        assert read(kind, answer) == completion


@given(KINDS, TEXTS, TEXTS, TEXTS)
@example("byte-level", "hi", "\n\nhello", "bye")
@example("byte-level-trimmed", "hi", "  hello", "\nbye")
@example("metaspace-first", "hi", "hello", " bye")
def test_an_answer_of_a_chat_starts_where_its_prompt_ends(
    kind: str, asked: str, answer: str, last: str
) -> None:
    assume(answer.strip() and last.strip() and known(kind, asked + answer + last))
    messages = conversation(asked, answer, "more", last)
    template = ChatTemplate(helpers.CHATML, {})
    for count in (2, 4):
        [tokens] = make(kind)(Chat(tuple(messages[:count])))
        runs = np.flatnonzero(np.diff(tokens.supervised.astype(int), prepend=0) == 1)
        assert len(runs) == count // 2
        prompt = plain(kind, template.render(messages[: count - 1], add_generation_prompt=True))
        if count == 2:  # what is before a later answer was tokenised in parts
            assert tokens.ids.tolist()[: runs[0]] == prompt
        own = supervised(tokens)
        ends = [place for place, token in enumerate(own) if token == plain(kind, "<|im_end|>")[-1]]
        assert len(ends) == count // 2
        first = plain(kind, template.render(messages[:1], add_generation_prompt=True))
        written = read(kind, [*first, *own[: ends[0]]]).removeprefix(read(kind, first))
        assert written == (
            unicodedata.normalize("NFC", answer) if kind == "byte-level-nfc" else answer
        )
        assert ends[0] > 0, "the end of the turn alone"


@given(KINDS, st.lists(st.tuples(TEXTS, TEXTS), max_size=5), st.booleans())
@example("byte-level", [("hi", "hello"), ("hi", "hello")], True)
def test_what_is_tokenised_together_has_the_tokens_of_each_alone(
    kind: str, pairs: list[tuple[str, str]], broken: bool
) -> None:
    # This holds also beside a text that no tokenizer accepts.
    tokenizer = make(kind)
    examples: list[Example] = [Completion(*pair) for pair in pairs]
    examples += [Chat(tuple(conversation(*pair))) for pair in pairs] + [
        Text(prompt) for prompt, _ in pairs
    ]
    examples += [Completion("hi", "half \ud800")] if broken else []

    def told(finish: Callable[[], list[Tokens]]) -> object:
        try:
            return [(tokens.ids.tolist(), tokens.supervised.tolist()) for tokens in finish()]
        except Rejected as why:
            return why.reason, why.message

    alone = [told(partial(tokenizer, each)) for each in examples]
    begun = [tokenizer.begin(each) for each in examples]
    tokenizer.ahead(begun)
    assert [told(each.finish) for each in begun] == alone
    assert ("bad_text" in str(alone)) == broken
    tokenizer.ahead([])


def test_a_token_that_begins_in_the_answer_and_ends_behind_it_is_supervised() -> None:
    # Templates without an end token: the line break after an answer may share a token with its full stop.
    inner = Tokenizer(
        models.WordLevel(
            {"<unk>": 0, "</s>": 1, "Q": 2, "A": 3, "yes": 4, ".\n": 5}, unk_token="<unk>"
        )
    )
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\.\n|yes|[\s\S]"), "isolated")
    template = (
        "{% for m in messages %}{{ 'Q' if m.role == 'user' else 'A' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}A{% endif %}"
    )
    spec = helpers.spec(template, json=inner.to_str(), eos_id=1, bos_id=None, add_bos=False)
    [tokens] = ExampleTokenizer(spec, 100)(Chat(tuple(conversation("x", "yes."))))
    assert tokens.ids.tolist() == [2, 3, 4, 5]
    assert tokens.supervised.tolist() == [False, False, True, True]


def test_a_tokenizer_that_panics_rejects_the_row() -> None:
    inner = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    encoder = Encoder(inner.to_str(), "tiny")
    with pytest.raises(Rejected) as caught:
        encoder.encode("a" * 40 + "b")
    assert caught.value.reason == "tokenizer"


def test_a_tokenizer_that_does_not_load_names_the_model() -> None:
    broken = json.dumps(
        {
            **json.loads(small_tokenizers.spec("byte-level").json),
            "model": {"type": "BPE", "vocab": 1},
        }
    )
    with pytest.raises(
        UserError, match=r"^model.name: the tokenizer of org/base does not load: "
    ) as caught:
        Encoder(broken, "org/base")
    assert "\n" not in str(caught.value)
