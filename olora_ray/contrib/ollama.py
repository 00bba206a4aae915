"""A folder for `ollama create`: the GGUF file of a merged model, with a Modelfile.

Ollama compares the chat template in a GGUF file with a list of known ones, and takes the nearest within 99 edits. If
none is near it sends the bare prompt, without a warning. Therefore the Modelfile has a TEMPLATE, in the language of
Go: the texts around the messages, as the tokenizer's own template renders them in three chats. A longer chat must then
be rendered alike; otherwise the Modelfile has no TEMPLATE, and a comment says so.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olora_ray.contrib import gguf
from olora_ray.model.load import tokenizer_in
from olora_ray.pipeline.exporter import Exporter, Trained

logger = logging.getLogger(__name__)

_FILE = "model.gguf"
_CONTEXT = 4096
"""Ollama's default number of tokens in prompt and answer."""
_SHORT = (("user", "@1@"),)
_LONG = (("user", "@1@"), ("assistant", "@2@"), ("user", "@3@"))
_WITH_SYSTEM = (("system", "@0@"), *_SHORT)
_CHECKED = (
    (("system", "@0@"), *_LONG, ("assistant", "@4@"), ("user", "@5@")),
    (*_LONG, *_LONG[1:]),
)

Messages = Sequence[tuple[str, str]]
"""(role, content) of each message."""


@dataclass(frozen=True)
class Turns:
    """The texts that a chat template puts around the messages."""

    head: str
    """Before a user's message that is the first of a chat, and before `around` it."""
    around: dict[str, tuple[str, str]]
    """Role -> (text before the content, text after it)."""
    answer: str
    """The text after the last message, at which the answer begins."""

    def render(self, messages: Messages) -> str:
        text = ""
        if messages[0][0] == "user":
            text = self.head
        for role, content in messages:
            before, after = self.around[role]
            text += before + content + after
        return text + self.answer

    def in_go(self) -> str:
        """Return the same as a template of Ollama."""
        body = ""
        for role, (before, after) in self.around.items():
            head = ""
            if role == "user" and self.head:
                head = "{{ if eq $i 0 }}" + self.head + "{{ end }}"
            body += '{{ if eq $m.Role "' + role + '" }}' + head + before
            body += "{{ $m.Content }}" + after + "{{ end }}"
        return "{{- range $i, $m := .Messages }}" + body + "{{ end }}" + self.answer


def turns_of(tokenizer: Any) -> Turns | None:
    """Return the texts around messages; None if the tokenizer's chat template does more than to put texts there.

    Without the token with which llama.cpp begins each prompt by itself.
    """
    short, long = _parts(tokenizer, _SHORT), _parts(tokenizer, _LONG)
    if len(short) != 2 or len(long) != 4:
        return None
    system = _parts(tokenizer, _WITH_SYSTEM)
    befores = [short[0], long[2]]
    if len(system) == 3:
        befores.append(system[1])
    # It compares characters, not parts of paths.
    before_user = os.path.commonprefix([text[::-1] for text in befores])[::-1]  # noqa: RUF071
    after_user = os.path.commonprefix([short[1], long[1]])  # noqa: RUF071
    around = {
        "user": (before_user, after_user),
        "assistant": (long[1].removeprefix(after_user), long[2].removesuffix(before_user)),
    }
    if len(system) == 3:
        around["system"] = (system[0], system[1].removesuffix(before_user))
    turns = Turns(short[0].removesuffix(before_user), around, short[1].removeprefix(after_user))
    for chat in _CHECKED:
        if chat[0][0] in around and _rendered(tokenizer, chat) != turns.render(chat):
            return None
    if "{{" in turns.render(_LONG):
        return None
    return turns


def _parts(tokenizer: Any, messages: Messages) -> list[str]:
    """Return the texts before, between and after the contents; empty if the template refuses the chat."""
    rest = _rendered(tokenizer, messages)
    parts = []
    for _, content in messages:
        before, found, rest = rest.partition(content)
        if not found:
            return []
        parts.append(before)
    return [*parts, rest]


def _rendered(tokenizer: Any, messages: Messages) -> str:
    chat = [{"role": role, "content": content} for role, content in messages]
    try:
        text: str = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template may raise anything
        logger.debug(f"the chat template refuses {chat}: {error}")
        return ""
    begins = gguf.frame(tokenizer)
    if begins and begins[0]:
        text = text.removeprefix(tokenizer.bos_token)
    return text


def write(trained: Trained, merged: Path, folder: Path, precision: str) -> None:
    """Write the GGUF file and the Modelfile; raise UserError as `gguf.write_file`."""
    gguf.write_file(trained, merged, folder / _FILE, precision)
    tokenizer: Any = tokenizer_in(merged, trained.config.model.trust_remote_code)
    (folder / "Modelfile").write_text(modelfile(trained, tokenizer), encoding="utf-8")


def modelfile(trained: Trained, tokenizer: Any) -> str:
    shape: Any = trained.model.config
    context = min(max(_CONTEXT, trained.config.data.max_length), shape.max_position_embeddings)
    lines = [
        "# ollama create NAME, in this folder; then ollama run NAME",
        f"FROM ./{_FILE}",
        f"PARAMETER num_ctx {context}",
        "# Without chance, as the answers were measured; delete both lines for Ollama's own defaults.",
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
    ]
    for token in tokenizer.convert_ids_to_tokens(list(trained.eos)):
        lines.append(f'PARAMETER stop "{token}"')
    if tokenizer.chat_template:
        turns = turns_of(tokenizer)
        if turns and _fits(turns.in_go()):
            lines.append(f'TEMPLATE """{turns.in_go()}"""')
            if "tools" in str(tokenizer.chat_template):
                missing = "the TEMPLATE writes no tools, which Ollama then refuses"
                logger.warning(f"Modelfile: {missing}; serve the file with llama-server --jinja")
                lines.append(
                    f"# {missing}: for tool calls serve {_FILE} with llama-server --jinja."
                )
        else:
            missing = "Ollama has no template for this model: its prompts would not be those of the training"
            logger.warning(f"Modelfile: {missing}; serve the file with llama-server --jinja")
            lines.append(
                f"# {missing}. Write a TEMPLATE, or serve {_FILE} with llama-server --jinja."
            )
    if trained.system and _fits(trained.system):
        lines.append(f'SYSTEM """{trained.system}"""')
    elif trained.system:
        logger.warning('Modelfile: it has no SYSTEM, because the system message has """ in it')
    return "\n".join(lines) + "\n"


def _fits(text: str) -> bool:
    return '"""' not in text and not text.endswith('"')


EXPORTER = Exporter(
    label="Ollama",
    needs="merged",
    options=gguf.EXPORTER.options,
    problem=gguf.problem,
    write=write,
)
