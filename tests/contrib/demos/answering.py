"""The engine of the ten mornings: vLLM, or a stand-in that answers by transformers and PEFT."""

import asyncio
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import requests
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.contrib.demos.person import Chat, said
from tests.pipelines.project import ROOT
from tests.ray_head import free_port
from tests.serving.engine import Engine
from tests.waiting import until

VLLM = ROOT / "build" / "serve" / "bin" / "vllm"
"""Installed by `make serve-test`."""
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

    def __init__(self, base: Path) -> None:
        self.model = Model(base)
        super().__init__("vllm", base)

    async def said(self, body: dict[str, Any], folder: str) -> tuple[str, str]:
        return await asyncio.to_thread(self.model.answer, body["messages"], folder)


class Vllm:
    """A server of vLLM in float32 on loopback, whose adapters `olora-ray follow` loads by HTTP."""

    def __init__(self, base: Path, log: Path) -> None:
        self.model = Model(base)
        """For what the person measures, beside the engine."""
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        words = f"serve {base} --host 127.0.0.1 --port {port} --dtype float32 --max-model-len 512"
        words += " --enforce-eager --enable-lora --max-lora-rank 64 --max-loras 2"
        own = {
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_PLUGINS": "",
            "HF_HUB_OFFLINE": "1",
        }
        with log.open("a") as out:
            self.process = subprocess.Popen(
                [str(VLLM), *words.split()], stdout=out, stderr=out, env=os.environ | own
            )
        until(self.is_healthy, 600, pause=1)

    def is_healthy(self) -> bool:
        assert self.process.poll() is None
        try:
            return requests.get(f"{self.url}/health", timeout=5).ok
        except requests.RequestException:
            return False

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)
