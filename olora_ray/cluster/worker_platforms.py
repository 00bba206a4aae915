"""The kind of the workers: on what, beside its config and data, the bytes of a training depend.

Their number is not part of it (train/tree.py).
"""

import logging
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from olora_ray.common import collectives
from olora_ray.common.text import plural

logger = logging.getLogger(__name__)

Kind = dict[str, str]
"""Device, processor, threads and torch of a worker."""

CPU_INFORMATION = Path("/proc/cpuinfo")


def kind_of(device: torch.device) -> Kind:
    """The kind of this process, which computes on `device`."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "device": name,
        "processor": f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
    }


def note_kinds(before: Sequence[Kind], device: torch.device) -> list[Kind]:
    """The different kinds of all workers; says so if there are several, or others than `before`, of a checkpoint.

    All workers must call it together. A checkpoint of an earlier version has none: then there is nothing to say.
    """
    every = collectives.gather(kind_of(device))
    now = [each for place, each in enumerate(every) if each not in every[:place]]
    if line := said(before, now):
        logger.warning(line)
    return now


def said(before: Sequence[Kind], now: Sequence[Kind]) -> str | None:
    """What there is to say of workers of these kinds after those of others."""
    if len(now) > 1:
        return (
            f"workers of {plural(len(now), 'kind')} ({_apart(now)}): "
            " the result may differ in its last bits with which of them computes what"
        )
    if before and list(before) != list(now):
        old = [each for each in before if each not in now]
        return (
            f"other workers than those of the checkpoint ({_apart([*old, *now])}): from here on the result"
            " may differ in its last bits from that of a run that went on as it began"
        )
    return None


def _apart(kinds: Sequence[Kind]) -> str:
    """In what they differ: `threads: 1, 2`."""
    fields = {what: list(dict.fromkeys(each.get(what, "?") for each in kinds)) for what in kinds[-1]}
    return "; ".join(f"{what}: {', '.join(values)}" for what, values in fields.items() if len(values) > 1)


def _processor() -> str:
    try:
        lines = CPU_INFORMATION.read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
