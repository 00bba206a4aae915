"""OLoRA and its family. `adapt` is for training loops of your own; it needs torch alone."""

from olora_ray.adapter.own_loop import adapt

__all__ = ["adapt"]
