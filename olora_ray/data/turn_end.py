"""The token with which a chat template ends an answer, and where a model that is trained on its chats stops writing.

It need not be the tokenizer's end token: bases come with the template of the chats that were made of them (those of
Qwen end a turn with <|im_end|>, and a text with <|endoftext|>).
"""

from olora_ray.data import template_trial
from olora_ray.data.chat_template import ChatTemplate
from olora_ray.data.encoder import Encoder
from olora_ray.data.tokenizer_spec import TokenizerSpec

_ANSWER = template_trial.MESSAGES[-1]["content"]


def turn_end(spec: TokenizerSpec) -> int | None:
    """Its id; None where the template writes no special token right after an answer, or renders no plain chat."""
    try:
        template_trial.check(spec.chat_template, spec.special_tokens, spec.name)
        text = ChatTemplate(spec.chat_template, spec.special_tokens, spec.name).render(template_trial.MESSAGES)
        _, answer, after = text.rpartition(_ANSWER)
        encoder = Encoder(spec.json, spec.name)
        first = encoder.ids(after.strip())[:1] if answer else []
    except Exception:  # a template is code and may raise anything; whoever makes tokens with it is told
        return None
    return first[0] if first and first[0] in encoder.special_ids() else None
