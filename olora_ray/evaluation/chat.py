"""Send a prompt to the base model and to the fine-tuned model of a run, and
show both answers. Starts no Ray.

    olora-ray chat RUN [PROMPT] [--system TEXT] [section.field=value ...]

RUN       name of a finished run in ./runs, its folder, a checkpoint, an
          adapter, or NAME@ALIAS of the registry
PROMPT    in quotes; without it, each line that you type is a prompt, until
          Ctrl-D
--system  system message before the prompt; default: the one that all rows of
          the data have

Decoding is greedy, as in the sample answers of a run. An answer has at most
evaluation.max_new_tokens tokens.
"""

import contextlib
import logging
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.config import command_line
from olora_ray.pipeline.run_folder import named
from olora_ray.tracking import models

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
        asked = {"base": False, "fine-tuned": True}
        if not answers.has_base:
            del asked["base"]
        for name, adapted in asked.items():
            text = answers(prompt, adapted) or "(nothing)"
            print(f"{name}:\n{textwrap.indent(text, '    ')}\n", flush=True)


def _place(name: str) -> str:
    """Return the name of a model for `targets.resolve`: of a run, its exported adapter.

    Raises UserError if there is no such model, or the run is not finished.
    """
    uri = models.uri_of(name)
    if uri or name.startswith("models:/"):
        return uri or name
    folder = command_line.absolute(name)
    # Of an adapter, a checkpoint and a model.
    for file in ("adapter_config.json", "manifest.json", "config.json"):
        if storage.exists(storage.join(folder, file)):
            return folder
    return storage.join(finished_run(name), "export", "adapter")


def finished_run(name: str) -> str:
    """Return the folder of a finished run; raises UserError if there is none, or if it is not finished."""
    folder = named(name)
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
    """A fine-tuned model that answers prompts: `model("...")`, or `model.generate([...])`.

    If it is an adapter on its base model, the adapter can be switched off.
    """

    def __init__(self, name: str, changes: Mapping[str, Any], system: str | None) -> None:
        place = _place(name)  # before torch is imported, which takes seconds
        self.place = place
        import torch

        from olora_ray.common.logs import quiet_transformers
        from olora_ray.data.tokenize import ExampleTokenizer, asks_in_chats
        from olora_ray.evaluation import held_out, targets
        from olora_ray.pipeline.base import with_tokenizer
        from olora_ray.pipeline.exporter import system_message

        logger.info(f"{place}: loading the model")
        quiet_transformers()
        # Nothing is scored here, so a scorer in Python that the run's config names is not imported.
        unscored = {"evaluation.scorer": None, **changes}
        if place.startswith("models:/"):
            settings = targets.settings_of_version(place, unscored)
        else:
            settings = targets.settings([place], None, unscored)
        target = targets.resolve(place, settings)
        self.has_base = target.adapter is not None
        """False for a merged model, which cannot answer as its base model."""
        self.base = with_tokenizer(target.base, target.config)
        self.limit = target.config.evaluation.max_new_tokens
        self.tokens = ExampleTokenizer(self.base.spec, max_length=sys.maxsize)
        sources = target.config.data.train
        self.chat = any(asks_in_chats(source, self.base.spec) for source in sources)
        if not sources:  # of a model that belongs to no run here
            self.chat = self.base.spec.has_template
        if system and not self.chat:
            raise UserError(
                f"argument --system: {place} was trained on texts without a chat template; leave it out"
            )
        if system is None and self.chat:
            system = (target.version and target.version.system) or system_message(sources)
            if system:
                logger.info(f"system message of the data: {system} (--system TEXT sets another)")
        self.system = system
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = held_out.load_adapted(target.base, target.adapter, target.config, self.device)

    def __str__(self) -> str:
        return self.place

    def __call__(self, prompt: str, adapted: bool = True) -> str:
        """Return the answer of the fine-tuned model (`adapted`) or of the base model. Raises as `generate`."""
        answer: str = self.generate(prompt, adapted=adapted)
        return answer

    def generate(
        self,
        prompts: str | Sequence[str],
        max_new_tokens: int | None = None,
        stream: bool = False,
        adapted: bool = True,
    ) -> Any:
        """Return the greedy answer to a prompt, or the answers to a list of prompts, which are computed in batches.

        With `stream`, return an iterator over the pieces of the answer to one prompt. An answer has at most
        `max_new_tokens` tokens; None: evaluation.max_new_tokens of the run. `adapted=False` asks the base model. Raises
        UserError if the chat template refuses a prompt, or if a merged model is asked for its base model.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        from olora_ray.pipeline.answers import as_text
        from olora_ray.train.generate import AT_ONCE, greedy

        asked = prompts
        if isinstance(prompts, str):
            asked = [prompts]
        tokens = [self.tokens.prompt(prompt, self.chat, self.system) for prompt in asked]
        limit = max_new_tokens or self.limit
        if not adapted and not self.has_base:
            raise UserError(
                f"{self.place}: is a merged model, without the answers of its base model; load its run or its adapter"
            )
        for layer in self.model.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.enable_adapters(adapted)
        if stream:
            if len(tokens) != 1:
                raise UserError("generate: stream=True takes one prompt, not several")
            return self._streamed(tokens[0], limit)
        texts = []
        for first in range(0, len(tokens), AT_ONCE):
            group = tokens[first : first + AT_ONCE]
            for answer in greedy(self.model, group, limit, self.base.eos, self.device):
                texts.append(as_text(self.base.tokenizer, answer))
        if isinstance(prompts, str):
            return texts[0]
        return texts

    def _streamed(self, tokens: tuple[int, ...], limit: int) -> Iterator[str]:
        from transformers import TextIteratorStreamer

        from olora_ray.train.generate import greedy

        streamer = TextIteratorStreamer(
            self.base.tokenizer, skip_prompt=True, skip_special_tokens=True
        )

        def work() -> None:
            try:
                greedy(self.model, [tokens], limit, self.base.eos, self.device, streamer=streamer)
            finally:
                streamer.end()  # also after an error, which the reader would wait for

        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(work)
            yield from filter(None, streamer)
            job.result()
