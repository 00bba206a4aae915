"""Put a prompt to the base model of a run and to its fine-tuned model, and show both answers. Starts no Ray.

    olora-ray chat RUN [PROMPT] [--system TEXT] [section.field=value ...]

RUN       name of a finished run in ./runs, or its folder
PROMPT    in quotes; without it each line that is typed is a prompt of its own, until Ctrl-D
--system  system message that goes before the prompt

Answers are greedy, like the sample answers of a run, and have up to evaluation.max_new_tokens tokens.
"""

import contextlib
import logging
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.config import command_line
from olora_ray.config.load import parse_assignments

logger = logging.getLogger(__name__)

FIELD = re.compile(r"\w+(\.\w+)+=")


def main(argv: list[str]) -> None:
    """Answer one prompt, or each line of standard input."""
    found = command_line.parse(argv, usage=__doc__ or "", options=["--system"])
    settings = [word for word in found.words if FIELD.match(word)]  # a prompt may have a = in it
    run, *prompts = [word for word in found.words if word not in settings] or [""]
    if not run or len(prompts) > 1:
        raise UserError("arguments: expected a run, and a prompt in quotes; --help shows how")
    folder = _finished(run)
    logger.info(f"{folder}: loading its base model and adapter")
    answers = Answers(folder, parse_assignments(settings), found.options.get("--system"))
    for prompt in prompts or _lines():
        for name, adapted in (("base", False), ("fine-tuned", True)):
            text = answers(prompt, adapted) or "(nothing)"
            print(f"{name}:\n{textwrap.indent(text, '    ')}\n", flush=True)


def _finished(name: str) -> str:
    """The folder of a finished run; raises UserError for another, with the runs that there are."""
    root = command_line.absolute("runs", Path.cwd())
    places = (command_line.absolute(name, Path.cwd()), storage.join(root, name))
    place = next((each for each in places if storage.exists(storage.join(each, "config.yaml"))), None)
    if place is None:
        there = [each for each in storage.names(root) if storage.exists(storage.join(root, each, "config.yaml"))]
        raise UserError(f"run {name}: no such folder, and none in {root}; there is {', '.join(there) or 'no run'}")
    if not storage.exists(storage.join(place, "result.json")):
        raise UserError(f"run {name}: is not finished; the command that began it continues it")
    return place


def _lines() -> Iterator[str]:
    """What is typed, or comes through a pipe."""
    with contextlib.suppress(EOFError):
        while True:
            if (line := input("> " if sys.stdin.isatty() else "")).strip():
                yield line


class Answers:
    """A run's base model with the exported adapter, which can be switched off."""

    def __init__(self, run: str, changes: Mapping[str, Any], system: str | None) -> None:
        """Load both; raises UserError for what does not load."""
        import torch

        from olora_ray.common.logs import quiet_transformers
        from olora_ray.data.tokenize import ExampleTokenizer, as_chat
        from olora_ray.evaluation import held_out, targets
        from olora_ray.pipeline.base import with_tokenizer

        quiet_transformers()
        adapter = storage.join(run, "export", "adapter")
        target = targets.resolve(adapter, targets.settings([adapter], None, changes))
        self.base = with_tokenizer(target.base, target.config)
        self.limit, self.system = target.config.evaluation.max_new_tokens, system
        self.tokens = ExampleTokenizer(self.base.spec, max_length=sys.maxsize)
        self.chat = any(
            as_chat(source, self.base.spec) if source.format == "prompt_completion" else source.format != "text"
            for source in target.config.data.train
        )
        if system and not self.chat:
            raise UserError(f"argument --system: {run} was trained on texts without a chat template")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = held_out.load(target.base, adapter, target.config, self.device)

    def __call__(self, prompt: str, adapted: bool) -> str:
        """The answer of the fine-tuned model, or of the base; raises UserError for a prompt the template refuses."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        from olora_ray.pipeline.answers import as_text
        from olora_ray.train.generate import decoding, greedy

        for layer in self.model.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.enable_adapters(adapted)
        with decoding(self.model):
            (found,) = greedy(self.model, [self._asked(prompt)], self.limit, self.base.eos, self.device)
        return as_text(self.base.tokenizer, found)

    def _asked(self, prompt: str) -> tuple[int, ...]:
        """The tokens before an answer, as an example of the training has them."""
        from olora_ray.data.formats import Chat, Completion, Rejected

        asked = [{"role": "system", "content": self.system}] if self.system else []
        # Its answer could be any text of which the tokenizer makes tokens.
        turns = (*asked, {"role": "user", "content": prompt}, {"role": "assistant", "content": prompt})
        try:
            (tokens,) = self.tokens(Chat(turns) if self.chat else Completion(prompt, prompt))
        except Rejected as why:
            raise UserError(f"the prompt cannot be put: {why.message}") from None
        return tuple(tokens.ids[: int(tokens.supervised.argmax())].tolist())
