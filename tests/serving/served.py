"""A short training of the quickstart's model, exported, and what transformers answers with the exports."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from olora_ray.cluster.spec import TrainSpec
from olora_ray.config.load import build, dump, parse_yaml
from olora_ray.config.schema import Config
from olora_ray.model.load import load_model
from olora_ray.pipeline import export
from olora_ray.pipeline.base import open_base
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.tokens.prepare import prepare
from olora_ray.train import checkpoints
from olora_ray.train.checkpoint import TrainState
from tests import tiny
from tests.pipelines.project import ROOT

STEPS, PROMPTS, LENGTH = 8, 20, 32
Chat = list[dict[str, str]]


@dataclass
class Served:
    """The exports of a run."""

    config: Config
    base: Path
    folder: RunFolder

    @property
    def chats(self) -> list[Chat]:
        """Held-out rows, with their answers."""
        lines = (ROOT / "pipelines/quickstart/heldout.jsonl").read_text().splitlines()[:PROMPTS]
        return [json.loads(line)["messages"] for line in lines]

    @property
    def gguf(self) -> Path:
        """The merged model in float32."""
        (file,) = Path(self.folder.export("gguf")).iterdir()
        return file


def make(folder: Path) -> Served:
    """Train the quickstart for a few steps, without Ray, and export it in float32."""
    settings = parse_yaml((ROOT / "pipelines/configs/quickstart.yaml").read_text(), "quickstart")
    settings["run"]["storage"] = str(folder)
    settings["model"]["dtype"] = "float32"
    settings["train"] |= {"global_batch": 1, "lr": 1e-3}
    settings["export"] = {"also": {"gguf": "f32"}}
    for split in ("train", "eval"):
        settings["data"][split][0]["path"] = str(ROOT / settings["data"][split][0]["path"])
    asked = build(settings)
    tiny.claimed(asked)
    config = tiny.decided(asked)
    base = open_base(config)
    train, held_out = prepare(config, base.spec, "train"), prepare(config, base.spec, "eval")
    trainer = tiny.trainer(
        config, "segments", load_model(base.model.folder, config.model, torch.device("cpu"))
    )
    for _ in tiny.steps(trainer, train, STEPS):
        pass
    run = RunFolder(config.folder())
    checkpoint = Path(run.checkpoints) / checkpoints.name_of(STEPS)
    trainer.snapshot(TrainState(STEPS), None, {}, dump(config))(checkpoint)
    spec = TrainSpec(config, base.model, base.spec.digest, base.eos, train, held_out)
    export.export_run(spec, run, STEPS)
    result = {"run": config.run.name, "base": base.model.to_json()}
    Path(run.result).write_text(json.dumps(result))
    return Served(config, Path(base.model.folder), run)


@dataclass(frozen=True)
class Answer:
    """The most likely answer to a prompt, token by token."""

    prompt: list[int]
    tokens: list[int]
    text: str
    logprobs: list[float]
    """Of each token."""
    leads: list[float]
    """By how much each token is more likely than the next one (difference of logarithms)."""

    def differences(self, found: list[tuple[float, bool]], tie: float) -> list[float]:
        """Compare with (log-probability, True if it is the most likely token) for each token of this answer.

        Return the differences; none of another engine's tokens may be more likely, unless both are within `tie`.
        """
        assert len(found) == len(self.tokens)
        others = [lead for lead, (_, first) in zip(self.leads, found, strict=True) if not first]
        assert max(others, default=0.0) <= tie, (
            f"other tokens are more likely, by transformers' {max(others):.4f}"
        )
        return [abs(own - other) for own, (other, _) in zip(self.logprobs, found, strict=True)]


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, chats: list[Chat]) -> list[Answer]:
    return [_answer(model, tokenizer, chat) for chat in chats]


def _answer(model: Any, tokenizer: Any, chat: Chat) -> Answer:
    text = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False).input_ids
    whole = model.generate(
        torch.tensor([prompt]), max_new_tokens=LENGTH, do_sample=False, use_cache=True
    )[0]
    logprobs = model(whole[None]).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    first, second = logprobs.topk(2).values.T
    tokens = whole[len(prompt) :].tolist()
    told = tokenizer.decode(tokens, skip_special_tokens=True)
    return Answer(prompt, tokens, told, first.tolist(), (first - second).tolist())


def same_answers(
    found: list[Answer], told: Callable[[Chat], str], chats: list[Chat], tie: float
) -> int:
    """Compare the texts that an engine tells for chats; returns how many of them have no tie, and are equal."""
    clear = [
        (answer, chat) for answer, chat in zip(found, chats, strict=True) if min(answer.leads) > tie
    ]
    for answer, chat in clear:
        assert told(chat[:-1]).strip() == answer.text.strip()
    return len(clear)
