"""Whether a question has room in a model's sequences: counted by the tokenizer and chat template that train on it."""

from collections.abc import Sequence

from olora_ray.common.errors import UserError
from olora_ray.data.example import Chat, Rejected
from olora_ray.data.mobility import answer
from olora_ray.data.mobility.prompt import Fits, Message
from olora_ray.data.tokenize import ExampleTokenizer
from olora_ray.data.tokenizer_spec import TokenizerSpec

LONGEST_PLACE = 2**31 - 1
"""Stands for the answer, which a server does not know: the same stays are then shown in training and serving."""


def fits(spec: TokenizerSpec, max_length: int) -> Fits:
    """The test whether a question and the longest answer are at most `max_length` tokens.

    It raises UserError for questions that the tokenizer or its chat template refuses.
    """
    tokenize = ExampleTokenizer(spec, max_length)
    last = {"role": "assistant", "content": answer.write(LONGEST_PLACE)}

    def fit(question: Sequence[Message]) -> bool:
        try:
            tokenize(Chat((*question, last)))
        except Rejected as rejected:
            if rejected.reason != "too_long":
                raise UserError(f"model.name: {spec.name} cannot be asked: {rejected.message}") from None
            return False
        return True

    return fit
