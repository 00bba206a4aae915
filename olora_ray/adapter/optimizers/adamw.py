"""AdamW (arXiv 1711.05101) on the flat vector; decay pulls the adapter towards its start."""

from collections.abc import Mapping

import torch
from torch import Tensor

from olora_ray.adapter.optimizers.optimizer import FlatAdapters, Optimizer, Settings, Update


class AdamW(Update):
    keys = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        flat: FlatAdapters,
        config: Settings,
        sizes: Mapping[str, Tensor] | None = None,
        fused: bool | None = None,
    ) -> None:
        """Prepare the moments. `fused`: an update is one kernel; None: on GPUs only."""
        super().__init__(flat, config, sizes)
        self.parameters = [torch.nn.Parameter(flat.vector[group]) for group in flat.groups]
        groups = [{"params": [parameter]} for parameter in self.parameters]
        # On CPUs the fused kernel differs from the plain update in the last bits, so resumed runs would change.
        if fused is None:
            fused = flat.vector.device.type == "cuda"
        self.inner = torch.optim.AdamW(
            groups, lr=0.0, weight_decay=config.weight_decay, fused=True if fused else None
        )
        for parameter, group in zip(self.parameters, flat.groups, strict=True):
            parameter.grad = flat.grad[group]
            moments = {key: moment[group] for key, moment in self.moments.items()}
            count = torch.zeros(
                (), dtype=torch.float32, device=flat.vector.device if fused else None
            )
            self.inner.state[parameter] = {"step": count, **moments}
        self.ratios = [1.0] if config.lr_ratio == 1 else [1.0, config.lr_ratio]

    def update(self, lr: float) -> None:
        for group, ratio in zip(self.inner.param_groups, self.ratios, strict=True):
            group["lr"] = lr * ratio
        self.inner.step()

    def load(self, named: Mapping[str, Tensor], step: int) -> None:
        super().load(named, step)
        for parameter in self.parameters:
            self.inner.state[parameter]["step"].fill_(float(step))


OPTIMIZER = Optimizer("adamw", AdamW)
