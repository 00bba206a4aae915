"""Send a prompt to the base model and to the fine-tuned model of a run, and show both answers. Starts no Ray.

    olora-ray chat RUN [PROMPT] [--system TEXT] [section.field=value ...]

RUN       name of a finished run in ./runs, or its folder
PROMPT    in quotes; without it, each line that you type is a prompt, until Ctrl-D
--system  system message before the prompt; default: the one that all rows of the data have

Decoding is greedy, as in the sample answers of a run. An answer has at most evaluation.max_new_tokens tokens.
"""

import contextlib
import logging
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.config import command_line

logger = logging.getLogger(__name__)

FIELD = re.compile(r"\w+(\.\w+)+=")


def main(argv: list[str]) -> None:
    arguments = command_line.parse(argv, usage=__doc__ or "", options=["--system"])
    # A prompt may contain a "=", so only words of the form section.field=value are settings.
    settings = tuple(word for word in arguments.words if FIELD.match(word))
    run, *prompts = [word for word in arguments.words if word not in settings] or [""]
    if not run or len(prompts) > 1:
        raise UserError(
            "arguments: expected RUN and at most one PROMPT in quotes; --help shows how"
        )
    changes = replace(arguments, words=settings).changes()
    answers = Answers(run, changes, arguments.options.get("--system"))
    for prompt in prompts or _lines():
        for name, adapted in (("base", False), ("fine-tuned", True)):
            text = answers(prompt, adapted) or "(nothing)"
            print(f"{name}:\n{textwrap.indent(text, '    ')}\n", flush=True)


def finished_run(name: str) -> str:
    root = command_line.absolute("runs")
    for folder in (command_line.absolute(name), storage.join(root, name)):
        if storage.exists(storage.join(folder, "config.yaml")):
            break
    else:
        names = storage.names(root)
        runs = [each for each in names if storage.exists(storage.join(root, each, "config.yaml"))]
        raise UserError(
            f"run {name}: no such run folder; {root} has {', '.join(runs) or 'no runs'}"
        )
    if not storage.exists(storage.join(folder, "result.json")):
        raise UserError(f"run {name}: not finished; run its training command again to resume")
    return folder


def _lines() -> Iterator[str]:
    mark = "> " if sys.stdin.isatty() else ""
    with contextlib.suppress(EOFError):
        while True:
            line = input(mark)
            if line.strip():
                yield line


class Answers:
    """The base model of a run with its exported adapter, which can be switched off."""

    def __init__(self, run: str, changes: Mapping[str, Any], system: str | None) -> None:
        folder = finished_run(run)  # before torch is imported, which takes seconds
        import torch

        from olora_ray.common.logs import quiet_transformers
        from olora_ray.data.tokenize import ExampleTokenizer, asks_in_chats
        from olora_ray.evaluation import held_out, targets
        from olora_ray.pipeline.base import with_tokenizer
        from olora_ray.pipeline.exporter import system_message

        logger.info(f"{folder}: loading the base model and the adapter")
        quiet_transformers()
        adapter = storage.join(folder, "export", "adapter")
        target = targets.resolve(adapter, targets.settings([adapter], None, changes))
        self.base = with_tokenizer(target.base, target.config)
        self.limit = target.config.evaluation.max_new_tokens
        self.tokens = ExampleTokenizer(self.base.spec, max_length=sys.maxsize)
        sources = target.config.data.train
        self.chat = any(asks_in_chats(source, self.base.spec) for source in sources)
        if system and not self.chat:
            raise UserError(
                f"argument --system: {folder} was trained on texts without a chat template; leave it out"
            )
        if system is None and self.chat:
            system = system_message(sources)
            if system:
                logger.info(f"system message of the data: {system} (--system TEXT sets another)")
        self.system = system
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = held_out.load_adapted(target.base, adapter, target.config, self.device)

    def __call__(self, prompt: str, adapted: bool = True) -> str:
        """Return the answer of the fine-tuned model (`adapted`) or of the base model.

        Raises UserError if the chat template refuses the prompt.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        from olora_ray.pipeline.answers import as_text
        from olora_ray.train.generate import greedy

        for layer in self.model.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.enable_adapters(adapted)
        asked = self.tokens.prompt(prompt, self.chat, self.system)
        (answer,) = greedy(self.model, [asked], self.limit, self.base.eos, self.device)
        return as_text(self.base.tokenizer, answer)
