"""Model folders with adapters, for the tests of export, parity and registry."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from olora_ray.adapter.candidates import Target, stored_transposed
from olora_ray.adapter.initialise import initialise
from olora_ray.adapter.inject import find_targets, inject
from olora_ray.adapter.layer import AdapterWeights, Factors
from olora_ray.adapter.peft_folder import write_adapter
from olora_ray.config.schema import Adapter
from olora_ray.config.schema import Model as ModelConfig
from olora_ray.model.load import skeleton
from olora_ray.model.source import BaseModel
from olora_ray.pipeline.merge import write_merged
from tests import tiny

IDS = torch.arange(40).reshape(2, 20) * 7 % (tiny.VOCABULARY - 2) + 2


@dataclass
class Case:
    """A base folder, a trained-looking adapter of it, and what the adapted model says to IDS."""

    base: Path
    settings: Adapter
    adapter: dict[str, AdapterWeights]
    logits: torch.Tensor

    @property
    def scale(self) -> float:
        return self.settings.scale()

    @cached_property
    def model(self) -> Any:
        """The base without weights."""
        return skeleton_of(self.base)

    def write_merged(self, out: Path) -> Path:
        write_merged(self.base, self.adapter, self.scale, out, self.model)
        return out

    def write_adapter(self, out: Path) -> Path:
        write_adapter(self.adapter, self.settings, "org/base", out, self.model)
        return out


def skeleton_of(folder: Path) -> Any:
    """The model of a folder without weights."""
    return skeleton(BaseModel(str(folder), str(folder), ""), ModelConfig(name=str(folder)))


def make_case(folder: Path, model: Any, settings: Adapter, shard: str = "5GB") -> Case:
    """Save `model` to `folder` and make an adapter with random dA and dB."""
    model.save_pretrained(folder, max_shard_size=shard)
    targets = find_targets(model, settings.targets, settings.rank)
    factors, _ = initialise(targets, settings.method, settings.rank, 3, torch.device("cpu"))
    adapter = {
        name: _trained(item, targets[name], i) for i, (name, item) in enumerate(factors.items())
    }
    for name, layer in inject(model, factors, settings.scale()).items():
        layer.da.data.copy_(adapter[name].da)
        layer.db.data.copy_(adapter[name].db)
    return Case(folder, settings, adapter, logits(model))


def make_stacked_case(
    folder: Path,
    model: Any,
    settings: Adapter,
    names: list[str] | None = None,
    ranks: bool = False,
) -> Case:
    """Like make_case, with every stack of experts adapted too; all factors are random, and `names` chooses layers.

    With `ranks` each layer has its own rank, and each third no B0.
    """
    model.save_pretrained(folder)
    # A router that is a linear layer (Llama 4's) returns two things: no adapter can wrap it.
    linear = [name for name in find_targets(model, "all-linear", 1) if not name.endswith("router")]
    stacks = [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and "experts" in name
    ]
    chosen = [*linear, *stacks] if names is None else names
    adapter = {name: random_adapter(model, name, settings.rank, i) for i, name in enumerate(chosen)}
    if ranks:
        adapter = {name: ranked(model, name, i) for i, name in enumerate(chosen)}
    for name, weights in adapter.items():
        delta = weights.delta(settings.scale())
        parameter = model.get_parameter(name if name in stacks else f"{name}.weight")
        parameter.data.add_(delta.mT if stored_transposed(model, name) else delta)
    return Case(folder, settings, adapter, logits(model))


def ranked(model: Any, name: str, number: int) -> AdapterWeights:
    """An adapter of the rank of its number, the third without B0."""
    found = random_adapter(model, name, 1 + number % 4, number)
    if number % 3:
        return found
    return replace(found, factors=Factors(found.factors.a0, None))


def random_adapter(model: Any, name: str, rank: int, seed: int = 0) -> AdapterWeights:
    """An adapter of a linear layer or of a stack, as if trained."""
    parameters = dict(model.named_parameters())
    *experts, m, n = parameters[name if name in parameters else f"{name}.weight"].shape
    if stored_transposed(model, name):
        m, n = n, m
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*experts, *shape, generator=generator)

    start = Factors(0.3 * draw(rank, n), 0.3 * draw(m, rank))
    return AdapterWeights(start, 0.03 * draw(rank, n), 0.03 * draw(m, rank))


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of one token a character, with a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [
        "<s>",
        "</s>",
        "<unk>",
        *(chr(code) for code in range(32, 32 + tiny.VOCABULARY - 3)),
    ]
    raw = Tokenizer(
        models.WordLevel({text: i for i, text in enumerate(characters)}, unk_token="<unk>")
    )
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
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
    return AdapterWeights(
        start, da, torch.randn(*experts, target.shape[0], rank, generator=generator) * 0.02
    )
