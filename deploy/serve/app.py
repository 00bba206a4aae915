"""Ray Serve on CPUs, following an alias. Run: Ray 2.60 on one machine (tests/serving/test_ray_serve.py); no cluster.

    MLFLOW_TRACKING_URI=http://HOST:5000 FOLLOW=chats@champion BASE=/models/base serve run deploy.serve.app:app

POST a chat to http://127.0.0.1:8000: {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64}. The answer
has OpenAI's form; its `model` is the version. Needs ray[serve]. It answers one request at a time: with GPUs use vLLM
(docs/serving.md).
"""

import asyncio
import os
import threading
import time
from typing import Any

from peft import PeftModel
from ray import serve
from starlette.requests import Request
from transformers import AutoModelForCausalLM, AutoTokenizer

from olora_ray.serving.watch import SECONDS, Adapter, Attempts, Watch


@serve.deployment
class Champion:
    def __init__(self, name: str, base: str, tracking_uri: str) -> None:
        self.name, self.base, self.lock = name, base, threading.Lock()
        self.watch, self.attempts = Watch(name, tracking_uri), Attempts(name)
        self.model: Any = AutoModelForCausalLM.from_pretrained(base)
        self.adapter: Adapter | None = None
        self.look()
        threading.Thread(target=self.follow, daemon=True).start()

    def follow(self) -> None:
        while True:
            time.sleep(SECONDS)
            self.look()

    def look(self) -> None:
        found = self.watch.look()
        if not found or found is self.adapter or self.attempts.resting(str(found)):
            return
        with self.attempts.attempt(str(found)):
            found.check_base(self.base)
            with self.lock:
                if isinstance(self.model, PeftModel):
                    self.model = self.model.unload()
                self.model = PeftModel.from_pretrained(self.model, found.folder)
                self.tokenizer = AutoTokenizer.from_pretrained(found.folder)
                self.adapter = found

    async def __call__(self, request: Request) -> dict[str, Any]:
        return await asyncio.to_thread(self.answer, **await request.json())

    def answer(
        self, messages: list[dict[str, str]], max_tokens: int = 64, **_: object
    ) -> dict[str, Any]:
        with self.lock:
            if self.adapter is None:
                raise RuntimeError(
                    f"{self.name}: no version could be loaded; see the log of this replica"
                )
            inputs = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            ids = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)[0]
            text = self.tokenizer.decode(
                ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            version = f"{self.adapter.version.name}@{self.adapter.version.number}"
        return {"model": version, "choices": [{"message": {"role": "assistant", "content": text}}]}

    def check_health(self) -> None:
        if self.adapter is None:
            raise RuntimeError(f"{self.name}: no version could be loaded")


app = Champion.bind(os.environ["FOLLOW"], os.environ["BASE"], os.environ["MLFLOW_TRACKING_URI"])
