"""Adapters for a training loop of your own: transformers' Trainer, accelerate, or a loop in plain torch.

    adapter = adapt(model, method="olora", rank=16, alpha=16)
    optimizer = adapter.optimizer("spectral", lr=0.004)
    ...                                             # your loop
    adapter.save("my_adapter")                      # PeftModel.from_pretrained(base, "my_adapter")

The start is the pipeline's for `run.seed` 17, in delta form, so the first output is the base model's to the bit. To
resume, adapt the base in the same way, then load the state dicts of model and optimizer: the model's has A0, B0, dA and
dB. In a process group, all processes must call adapt() and optimizer() together.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from olora_ray.adapter.candidates import Target
from olora_ray.adapter.initialise import initialise, weight_sizes
from olora_ray.adapter.inject import find_targets, inject, install, remove
from olora_ray.adapter.layer import AdaptedWeight
from olora_ray.adapter.methods import method_named
from olora_ray.adapter.methods.method import Options
from olora_ray.adapter.optimizers.optimizer import FlatAdapters, Update, optimizer_named
from olora_ray.common.errors import UserError
from olora_ray.config.tables import METHODS, OPTIMIZERS


def adapt(
    model: nn.Module,
    method: str = "olora",
    rank: int = 16,
    alpha: float = 16,
    *,
    targets: str | tuple[str, ...] = "all-linear",
    dropout: float = 0.0,
    rank_stabilized: bool = False,
    sigma: float | Literal["matched"] = 0.02,
    seed: int = 17,
) -> "ModelAdapter":
    """Freeze the model, and put trainable adapters into it; the settings are those of the config's section `adapter`.

    Afterwards the parameters with requires_grad are dA and dB of each layer, in float32. Raises UserError for a setting
    or a model that does not fit, before it changes the model.
    """
    if not METHODS.knows(method):
        raise UserError(f"method: {METHODS.unknown(method)}")
    chosen = method_named(method)
    if chosen.needs != "weight":
        raise UserError(
            f"method={method} starts from training rows; use the pipeline (olora-ray finetune, adapter.method={method})"
        )
    if rank < 1 or not alpha > 0:
        raise UserError(f"rank={rank} and alpha={alpha} must be larger than 0")
    if not 0 <= dropout < 1:
        raise UserError(f"dropout={dropout} must be at least 0 and less than 1")
    for name, module in model.named_modules():
        if isinstance(module, AdaptedWeight):
            raise UserError(f"model: {name} is adapted already; call remove() of its adapter first")
        if type(module).__module__.startswith("peft."):
            raise UserError("model: it has an adapter of PEFT; call its merge_and_unload() first")
    if targets != "all-linear" and isinstance(targets, str):
        targets = (targets,)
    found = find_targets(model, targets, rank)
    first = _device(next(iter(found.values())))
    options = Options(sigma=sigma)
    made, _ = initialise(found, method, rank, seed, first, options)
    scale = alpha / rank
    if rank_stabilized:
        scale = alpha / rank**0.5
    factors = {name: chosen.at_scale(each, scale, options) for name, each in made.items()}
    layers = inject(model, factors, scale, dropout)
    for name, layer in layers.items():
        target = found[name]
        layer.whole_steps = False
        # In the state dict, because the last bits of the factors depend on the number of threads.
        layer.register_buffer("a0", layer.a0)
        layer.register_buffer("b0", layer.b0)
        layer.to(_device(target)).train(target.module.training)
    install(model, layers)
    return ModelAdapter(model, layers, rank, alpha, rank_stabilized, found)


def _device(target: Target) -> torch.device:
    tensor = next(chain(target.module.parameters(), target.module.buffers()))
    return tensor.device


@dataclass(frozen=True)
class ModelAdapter:
    """The adapter of a whole model; `layers` are its layers by name."""

    model: nn.Module
    layers: Mapping[str, AdaptedWeight]
    rank: int
    alpha: float
    rank_stabilized: bool
    targets: Mapping[str, Target]

    def optimizer(
        self,
        name: str = "adamw",
        lr: float = 0.001,
        lr_ratio: float = 1.0,
        weight_decay: float = 0.0,
    ) -> "AdapterOptimizer":
        """Return an optimizer of the pipeline (`train.optimizer`), for this adapter alone.

        `lr` is the learning rate of dA, and `lr_ratio` that of dB divided by it. Clipping is the loop's.
        """
        if not OPTIMIZERS.knows(name):
            raise UserError(f"optimizer: {OPTIMIZERS.unknown(name)}")
        sizes: Mapping[str, Tensor] = {}
        if optimizer_named(name).sizes:
            with self._removed():
                sizes = weight_sizes(self.targets, _device(next(iter(self.targets.values()))))
        return AdapterOptimizer(self.layers, name, lr, Rates(lr_ratio, weight_decay), sizes)

    def save(self, folder: str | Path) -> None:
        """Write a LoRA folder for the unchanged base, which PEFT and vLLM read; it replaces `folder` when complete."""
        from olora_ray.adapter.peft_folder import write_adapter  # with safetensors

        weights = {name: layer.weights() for name, layer in self.layers.items()}
        base = getattr(getattr(self.model, "config", None), "_name_or_path", "")
        with self._removed():
            write_adapter(weights, self, base, Path(folder), self.model)

    def remove(self) -> None:
        """Put the base's own layers back; the base stays frozen."""
        remove(self.model)

    @contextmanager
    def _removed(self) -> Iterator[None]:
        remove(self.model)
        try:
            yield
        finally:
            install(self.model, self.layers)


@dataclass(frozen=True)
class Rates:
    """The settings of an optimizer beside its learning rate (`Settings`)."""

    lr_ratio: float
    weight_decay: float
    clip: None = None


class AdapterOptimizer(torch.optim.Optimizer):
    """An optimizer of the pipeline as torch's: schedulers, Trainer and accelerate take it as any other."""

    def __init__(
        self,
        layers: Mapping[str, AdaptedWeight],
        name: str,
        lr: float,
        rates: Rates,
        sizes: Mapping[str, Tensor],
    ) -> None:
        parameters = [part for layer in layers.values() for part in (layer.da, layer.db)]
        super().__init__(parameters, {"lr": lr})
        self._layers = layers
        self._name = name
        self._rates = rates
        self._sizes = sizes
        self._update: Update | None = None

    def _current(self) -> Update:
        """Return the update on the parameters as they are now: model.to() may have given them other memory."""
        update = self._update
        if update is not None and all(
            slot.data_ptr() == update.flat.view(update.flat.vector, name).data_ptr()
            for name, slot in update.flat.slots.items()
        ):
            return update
        flat = FlatAdapters(self._layers, apart=self._rates.lr_ratio != 1)
        renewed = optimizer_named(self._name).begin(flat, self._rates, self._sizes)
        if update is not None:
            renewed.load(update.state(), update.count)
        self._update = renewed
        return renewed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (group,) = self.param_groups
        # Taken first: new flat vectors come with gradients of their own.
        given = [(layer.da.grad, layer.db.grad) for layer in self._layers.values()]
        update = self._current()
        flat = update.flat
        for (name, layer), (grad_a, grad_b) in zip(self._layers.items(), given, strict=True):
            for part, slot, gradient in (("da", layer.da, grad_a), ("db", layer.db, grad_b)):
                slot.grad = flat.view(flat.grad, f"{name}.{part}")
                if gradient is None:
                    slot.grad.zero_()
                else:
                    slot.grad.copy_(gradient)
        update.prepare()
        update.step(group["lr"], norm=0.0)  # no clipping, so nothing reads the norm
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the moments by the names of the parameters, the number of updates, and torch's parameter groups."""
        update = self._current()
        moments = {"moments": update.state(), "count": update.count}
        return {"state": moments, "param_groups": super().state_dict()["param_groups"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        saved = state_dict["state"]
        self._current().load(saved["moments"], saved["count"])
