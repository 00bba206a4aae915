"""Model folders with adapters, for the tests of export, parity and registry."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from olora_ray.adapter.factors import AdapterWeights, Factors
from olora_ray.adapter.initialise import initialise
from olora_ray.adapter.inject import inject
from olora_ray.adapter.targets import Target, find_targets
from olora_ray.config.schema import Adapter
from tests import tiny

IDS = torch.arange(40).reshape(2, 20) * 7 % (tiny.VOCABULARY - 2) + 2


@dataclass
class Case:
    """A base folder, a trained-looking adapter of it, and what the adapted model says to IDS."""

    base: Path
    settings: Adapter
    adapter: dict[str, AdapterWeights]
    transposed: frozenset[str]
    logits: torch.Tensor

    @property
    def scale(self) -> float:
        return self.settings.scale()


def make_case(folder: Path, model: Any, settings: Adapter, shard: str = "5GB") -> Case:
    """Save `model` to `folder` and make an adapter with random dA and dB."""
    model.save_pretrained(folder, max_shard_size=shard)
    targets = find_targets(model, settings.targets, settings.rank)
    transposed = frozenset(name for name, target in targets.items() if target.stored_transposed)
    factors, _ = initialise(targets, settings.method, settings.rank, 3, torch.device("cpu"))
    adapter = {name: _trained(item, targets[name], i) for i, (name, item) in enumerate(factors.items())}
    for name, layer in inject(model, factors, settings.scale()).items():
        layer.da.data.copy_(adapter[name].da)
        layer.db.data.copy_(adapter[name].db)
    return Case(folder, settings, adapter, transposed, logits(model))


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of one token a character, with a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["<s>", "</s>", "<unk>", *(chr(code) for code in range(32, 32 + tiny.VOCABULARY - 3))]
    raw = Tokenizer(models.WordLevel({text: i for i, text in enumerate(characters)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    """What a model says to IDS."""
    found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found.float()


def _trained(start: Factors, target: Target, seed: int) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    *experts, rank, _ = start.a0.shape
    da = torch.randn(start.a0.shape, generator=generator) * 0.02
    return AdapterWeights(start, da, torch.randn(*experts, target.shape[0], rank, generator=generator) * 0.02)
