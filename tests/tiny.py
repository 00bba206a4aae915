"""Small things to test with: random models, packs, stores in memory, configs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from olora_ray.config.decided import DataConfig, DecidedConfig, Expected, with_values
from olora_ray.config.load import at, build
from olora_ray.config.schema import Config
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.tokens.arrival import Arrival
from olora_ray.tokens.manifest import Outline, ShardInfo
from olora_ray.tokens.store import Front

VOCABULARY = 96
CPU = torch.device("cpu")


def llama(
    vocab_size: int = VOCABULARY,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Any:
    """A Llama with 2 layers and grouped heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    return _model(
        LlamaForCausalLM,
        LlamaConfig(vocab_size=vocab_size, **(settings | changes)),
        attention,
        dtype,
    )


def gpt2(attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    """A GPT-2 with 2 layers: Conv1D layers, tied head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=128,
        bos_token_id=0,
        eos_token_id=1,
    )
    return _model(GPT2LMHeadModel, shape, attention, dtype)


def _model(model_class: Any, shape: Any, attention: str, dtype: torch.dtype) -> Any:
    from olora_ray.model import attention as segment_attention

    segment_attention.register()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = model_class(shape)
    model.set_attn_implementation(attention)
    return model.to(dtype).eval().requires_grad_(False)


def attention_of(model: Any) -> str:
    """The attention that a model is set to."""
    return str(model.config._attn_implementation)


def config(**changes: Any) -> Config:
    """A config with dotted changes, written with double underscores: `config(train__lr=1e-3)`."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"name": "test", "seed": 3},
        "model": {"name": "unused"},
        "data": {"train": [{"path": "unused.jsonl"}]},
        "adapter": {"rank": 4, "alpha": 8},
        "train": {"global_batch": 4, "micro_batch": 2, "lr": 1.0e-2, "warmup": 0.0},
        "cluster": {"workers": 1},
    }
    for field, value in changes.items():
        section, name = field.split("__")
        tree.setdefault(section, {})[name] = value
    return build(tree)


def decided(config: Config | None = None, **changes: Any) -> DecidedConfig:
    """The config without `auto`, as one process without GPUs would decide; with changes as of `config`."""
    given = _config(**changes) if config is None else config
    if isinstance(given, DecidedConfig):
        return given
    values: dict[str, Any] = {
        "data.max_length": 512,
        "data.packing": True,
        "train.objective": "tokens",
        "train.micro_batch": 4,
        "train.activation_checkpointing": False,
        "cluster.workers": 2,
        "cluster.gpus_per_worker": 0.0,
    }
    asked = {field: value for field, value in values.items() if at(given, field) == "auto"}
    return with_values(given, DecidedConfig, asked)


def spec(start: str | None = None, **changes: Any) -> Any:
    """What a worker is given to train: the config with changes, on packs of this module."""
    from olora_ray.cluster.spec import TrainSpec
    from olora_ray.model.source import BaseModel

    base, packs = BaseModel("m", "/m", "base"), store()
    return TrainSpec(decided(**changes), base, "tokenizer", (0,), packs, None, start)


def save(folder: Path, **shape: Any) -> None:
    """Write a Llama whose tokenizer is files that nothing reads."""
    llama(**shape).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")


def of_data(config: Config) -> Any:
    """What is decided about the data of a config: length and packing."""
    from olora_ray.cluster.decide import DataDecisions

    known = decided(config)
    values = {"data.max_length": known.data.max_length, "data.packing": known.data.packing}
    return DataDecisions(with_values(config, DataConfig, values), {})


def plan(config: Config, base: Any) -> None:
    """Log the plan of a run on this machine."""
    from olora_ray.cluster.decide import decide
    from olora_ray.cluster.preflight import ClusterFacts
    from olora_ray.pipeline import prepare

    prepare.check_settings(config)
    here = ClusterFacts.here(config.cluster)
    made = decide(config, of_data(config), base, here)
    prepare.plan(made, base)
    prepare.tell(made)


def read_as(config: Config) -> Config:
    """The config with the formats that the first look finds."""
    from olora_ray.data import detect

    return detect.with_formats(config, detect.check_data(config))


_config = config
ON_CPU = Expected(gpu=False, dtype="float32", attention="auto")
"""What a plan expects on this machine."""
ON_GPU = Expected(gpu=True, dtype="bfloat16", attention="auto")


def claimed(config: Config) -> RunFolder:
    """The folder of a run that has begun."""
    folder = RunFolder(config.folder())
    folder.write_config(config, {}, folder.state())
    return folder


def pack(*lengths: int, seed: int = 0, prompt: int = 3, vocabulary: int = VOCABULARY) -> Any:
    """A Pack of random examples; each has `prompt` unsupervised tokens at its start."""
    from olora_ray.tokens.plan import Pack

    rng = np.random.default_rng(seed)
    ids = rng.integers(2, vocabulary, sum(lengths)).astype(np.int32)
    supervised = np.concatenate([np.arange(length) >= prompt for length in lengths])
    return Pack(ids, supervised, tuple(lengths))


def unpacked(packs: Sequence[Any]) -> list[Any]:
    """The same examples, one a pack."""
    from olora_ray.tokens.plan import Pack

    singles = []
    for item in packs:
        place = 0
        for length in item.segments:
            part = slice(place, place + length)
            singles.append(Pack(item.input_ids[part], item.supervised[part], (length,)))
            place += length
    return singles


@dataclass(frozen=True)
class Counts:
    """What a training and its export read of a store's manifest."""

    supervised: int
    packs: int
    tokens: int
    rows: int
    rejected: ClassVar[dict[str, int]] = {}
    inputs: ClassVar[dict[str, Any]] = {}


class ListStore(Arrival):
    """Packs in memory, read like a token store, in shards of `sizes` packs.

    The first `arrived` shards are where `look` finds them: the store is still being written, if these are not all.
    """

    def __init__(
        self, packs: Sequence[Any], sizes: Sequence[int] = (), arrived: int | None = None
    ) -> None:
        self._packs = list(packs)
        self.sizes = list(sizes) or [len(packs)]
        self.arrived = len(self.sizes) if arrived is None else arrived
        super().__init__("list", Outline("list", len(self.sizes), 0, ()))
        self.look()

    @property
    def complete(self) -> bool:
        return self.total is not None

    @property
    def manifest(self) -> Any:
        every = range(len(self))
        size = self.counts(every)
        return Counts(size.supervised, len(self), size.tokens, size.examples)

    def look(self) -> None:
        """Look for more shards."""
        shards = [ShardInfo(size, 0, 0, 0, "") for size in self.sizes[: self.arrived]]
        self.front = Front(tuple(shards))

    def __getitem__(self, index: int) -> Any:
        if index >= len(self):
            raise IndexError(index)
        pack = self._packs[index]
        return replace(pack, reference=self.reference[index]) if self.reference else pack

    def counts(self, indices: Iterable[int]) -> Any:
        """The size of these packs together."""
        from olora_ray.tokens import plan

        parts = (each for index in indices for each in self._packs[index].examples())
        return sum(parts, plan.Counts())

    def origins(self, index: int) -> list[str]:
        """Where the examples of a pack come from."""
        return [f"rows.jsonl:{index * 10 + i}" for i in range(len(self._packs[index].segments))]


def store(count: int = 8, seed: int = 0) -> ListStore:
    """Packs of uneven examples."""
    rng = np.random.default_rng(seed)
    return ListStore(
        [pack(*rng.integers(5, 17, 3).tolist(), seed=seed * 1000 + i) for i in range(count)]
    )


def trainer(
    config: Config,
    attention: str = "segments",
    model: Any = None,
    strategy: str = "ddp",
    device: torch.device = CPU,
) -> Any:
    """A Trainer over a tiny Llama, or this model, with adapters on all linear layers."""
    from olora_ray.adapter.initialise import at_scale, initialise, options_of, weight_sizes
    from olora_ray.adapter.inject import find_targets, inject
    from olora_ray.adapter.optimizers.optimizer import optimizer_named
    from olora_ray.train.loop import Trainer
    from olora_ray.train.loss import SupervisedLoss
    from olora_ray.train.parallel import place_model

    model, settings = model or llama(attention=attention), decided(config)
    adapter = settings.adapter
    targets = find_targets(model, adapter.targets, adapter.rank)
    options = options_of(adapter)
    factors, _ = initialise(
        targets, adapter.method, adapter.rank, settings.run.seed, device, options
    )
    chosen = optimizer_named(settings.train.optimizer)
    sizes = weight_sizes(targets, device) if chosen.sizes else {}
    adapted = inject(model, at_scale(factors, adapter), adapter.scale(), adapter.dropout)
    loss = SupervisedLoss(model)
    place_model(loss, strategy, device)
    return Trainer(loss, adapted, settings, device, sizes=sizes)


def steps(
    trainer: Any,
    packs: Any = None,
    count: int | None = None,
    start: int = 0,
    attention: str = "segments",
) -> Any:
    """The steps of this worker, from number `start` to `count`, or to the config's number."""
    from olora_ray.common import collectives
    from olora_ray.train.loader import Schedule, StepLoader

    packs, train, seed = packs or store(), trainer.config.train, trainer.config.run.seed
    loader = StepLoader(packs, train, seed, attention, collectives.rank(), collectives.world_size())
    return trainer.steps(
        loader, start, Schedule(train.model_copy(update={"steps": count or train.steps}), packs)
    )


def gradients(trainer: Any) -> list[torch.Tensor]:
    """Grows with each step by the gradient that the optimizer is given."""
    found: list[torch.Tensor] = []
    trainer.optimizer.inner.register_step_pre_hook(
        lambda *_: found.append(trainer.flat.grad.clone())
    )
    return found


def moved(trainer: Any) -> Any:
    """The trainer with an adapter that is past its start, so that dA and dB both have gradients."""
    noise = torch.randn(trainer.flat.vector.shape, generator=torch.Generator().manual_seed(0))
    trainer.flat.vector.copy_(0.1 * noise)
    return trainer


SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
"""Sizes that most families take."""
LONG_ROPE: dict[str, Any] = SMALL | {
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 64,
    },
}
"""Of a family whose frequencies are others beyond 64 tokens (Phi-3)."""


def of_kind(kind: str, sizes: dict[str, Any]) -> Any:
    """A model of a family, with the family's own initialisation; those of tests/families draw theirs."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(3)
        return (
            AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
            .eval()
            .requires_grad_(False)
        )
