"""Send a prompt to the base model and to the fine-tuned model of a run, and show both answers. Starts no Ray.

    olora-ray chat RUN [PROMPT] [--system TEXT] [section.field=value ...]

RUN       name of a finished run in ./runs, or its folder
PROMPT    in quotes; without it, each line that you type is a prompt, until Ctrl-D
--system  system message before the prompt; default: the one that all rows of the data have

Decoding is greedy, as in the sample answers of a run. An answer has at most evaluation.max_new_tokens tokens.
"""

import contextlib
import itertools
import logging
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.config import command_line
from olora_ray.config.section import Source

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


def _finished(name: str) -> str:
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


def _system(sources: Sequence[Source]) -> str | None:
    """Return the system message of all rows at the beginning of the data; None if there is none or the data is gone."""
    from olora_ray.data import reader, scan
    from olora_ray.data.formats import columns_of, to_example
    from olora_ray.data.formats.format import Chat, Rejected
    from olora_ray.data.sources import list_files

    found = set[str | None]()
    for source in sources:
        columns = columns_of(source.format, source.fields)
        with contextlib.suppress(UserError, OSError, IndexError):
            file = scan.head(list_files(source, "data.train", "")[0])
            assert file.file
            read = reader.read_unit(file.file, file.units[0], file.columns, columns)
            for _, row in itertools.islice(read, 100):
                with contextlib.suppress(Rejected):
                    example = to_example(source.format, row, source.fields, True, source)
                    content = None
                    if isinstance(example, Chat) and example.messages[0].get("role") == "system":
                        content = example.messages[0].get("content")
                    found.add(content)
    if len(found) != 1:
        return None
    system = found.pop()
    if system:
        logger.info(f"system message of the data: {system} (--system TEXT sets another)")
    return system


class Answers:
    """The base model of a run with its exported adapter, which can be switched off."""

    def __init__(self, run: str, changes: Mapping[str, Any], system: str | None) -> None:
        folder = _finished(run)  # before torch is imported, which takes seconds
        import torch

        from olora_ray.common.logs import quiet_transformers
        from olora_ray.data.tokenize import ExampleTokenizer, asks_in_chats
        from olora_ray.evaluation import held_out, targets
        from olora_ray.pipeline.base import with_tokenizer

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
            system = _system(sources)
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
