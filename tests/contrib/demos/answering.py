"""A stand-in for an engine that generates its answers, by transformers and PEFT with the adapter that it serves."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.contrib.demos.person import Chat, said
from tests.serving.engine import Engine

LONGEST = 40
"""Tokens after which an answer is cut."""


class Model:
    """A base model with adapters, each loaded once."""

    def __init__(self, base: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self.names = dict[str, str]()  # folder of an adapter -> its name here
        self.known = dict[tuple[Any, ...], float]()
        self.one = threading.Lock()

    def use(self, folder: str) -> None:
        name = self.names.setdefault(folder, f"adapter{len(self.names)}")
        if not isinstance(self.network, PeftModel):
            self.network = PeftModel.from_pretrained(self.network, folder, adapter_name=name)
        elif name not in self.network.peft_config:
            self.network.load_adapter(folder, adapter_name=name)
        self.network.set_adapter(name)

    def answer(self, chat: Chat, folder: str) -> tuple[str, str]:
        """Return the answer, and why it ended."""
        with self.one, torch.inference_mode():
            self.use(folder)
            asked = self.ids(chat, add_generation_prompt=True)
            (ids,) = self.network.generate(
                input_ids=torch.tensor([asked]), max_new_tokens=LONGEST, do_sample=False
            ).tolist()
        text = self.tokenizer.decode(ids[len(asked) :], skip_special_tokens=True)
        end = "length" if len(ids) == len(asked) + LONGEST else "stop"
        return text.strip(), end

    def gain(self, chat: Chat, answer: str, folder: str) -> float:
        """Return by how much log p of an answer is higher with the adapter than without, in nats."""
        asked = len(self.ids(chat, add_generation_prompt=True))
        ids = self.ids([*chat, said(answer)])
        with self.one, torch.inference_mode():
            self.use(folder)
            with self.network.disable_adapter():
                before = self.log_p("", ids, asked)
            return self.log_p(folder, ids, asked) - before

    def log_p(self, folder: str, ids: list[int], start: int) -> float:
        """Return log p of the tokens from `start` on, with the adapter in use, which `folder` names."""
        key = (folder, *ids)
        if key not in self.known:
            logits = self.network(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
            found = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[start:])[:, None])
            self.known[key] = float(found.sum())
        return self.known[key]

    def ids(self, chat: Chat, **how: Any) -> list[int]:
        return list(self.tokenizer.apply_chat_template(chat, return_dict=False, **how))


class Answering(Engine):
    """Answers with the model's own words, one chat at a time."""

    def __init__(self, base: Path, port: int = 0) -> None:
        self.model = Model(base)
        super().__init__("vllm", base, port)

    async def said(self, body: dict[str, Any], folder: str) -> tuple[str, str]:
        return await asyncio.to_thread(self.model.answer, body["messages"], folder)
