"""The measurements of benchmarks/gpu.py: initialisation, and a training pass of ours and of PEFT with transformers'
Trainer."""

import resource
import tempfile
from collections import deque
from collections.abc import Iterator
from dataclasses import fields
from itertools import islice
from typing import Any

import numpy as np
import torch
from common import config, memory_store
from contestants import Setting
from gpu_models import SIZES, Row, chats, random_llama
from multiplications import needed, shapes_of, timed
from peers import arguments, pad
from torch import Tensor

from olora_ray.adapter.initialise import at_scale, initialise, options_of
from olora_ray.adapter.inject import Target, find_targets, inject
from olora_ray.config.schema import Config
from olora_ray.tokens.collate import collate
from olora_ray.tokens.store import order
from olora_ray.train.loader import Schedule, StepLoader
from olora_ray.train.loop import Trainer
from olora_ray.train.loss import SelfTest, SupervisedLoss
from olora_ray.train.parallel import place_model
from olora_ray.train.self_test import choose_attention

Found = dict[str, Any]


def initialisation(job: dict[str, Any]) -> Found:
    """Return seconds for the factors of the complete model, and of its first block beside PEFT's."""
    device, rank = torch.device(job["device"]), int(job["rank"])
    model = random_llama(job["size"], getattr(torch, job["dtype"]), device)
    targets = find_targets(model, "all-linear", rank)
    first = {name: target for name, target in targets.items() if ".layers.0." in name}
    initialise(first, "olora", rank, 0, device)  # warms up
    whole = timed(lambda: initialise(targets, "olora", rank, 0, device), device)
    block = timed(lambda: initialise(first, "olora", rank, 0, device), device)
    ours, _ = initialise(first, "olora", rank, 0, device)
    theirs, seconds = _peft_block(model, first, rank, device)
    return {
        "layers": len(targets),
        "ours": whole,
        "layers of a block": len(first),
        "ours, a block": block,
        "PEFT, a block": seconds,
        "ratio": seconds / block,
        "difference": max(
            float((mine.cpu() - other.float().cpu()).abs().max())
            for name in first
            for mine, other in zip((ours[name].a0, ours[name].b0), theirs[name], strict=True)
            if mine is not None
        ),
    }


def ours(job: dict[str, Any]) -> Found:
    device, store = torch.device(job["device"]), memory_store(_rows(job), job["length"])
    settings = _settings(job)
    trainer, tested = _our_trainer(job, settings, store)
    shapes = shapes_of(trainer, collate(store[:1], tested.attention))
    steps = -(-len(store) // settings.train.global_batch)

    def one_pass() -> Iterator[Any]:
        loader = StepLoader(store, settings.train, settings.run.seed, tested.attention)
        return trainer.steps(loader, 0, Schedule(settings.train.model_copy(update={"steps": steps}), store))

    deque(islice(one_pass(), 1), maxlen=0)
    seconds = timed(lambda: deque(one_pass(), maxlen=0), device)
    places = order(len(store), settings.run.seed, 0, steps * settings.train.global_batch)
    done = [store[int(place)] for place in places]
    lengths = [length for pack in done for length in pack.segments]
    work = needed(shapes, lengths, sum(int(pack.supervised.sum()) for pack in done))
    return {
        **_speed(len(lengths), sum(lengths), seconds, device),
        "operations a token": sum(work.values()) / sum(lengths),
        "attention": tested.attention,
        "passed over": dict(tested.passed_over),
    }


def _settings(job: dict[str, Any]) -> Config:
    micro = int(job["batch"])
    return config(
        "unused",
        {"name": "unused", "dtype": job["dtype"]},
        adapter={"rank": job["rank"], "alpha": job["rank"]},
        data={"train": [{"path": "unused.jsonl"}], "max_length": job["length"]},
        train={
            "global_batch": max(1, job["step_tokens"] // job["length"] // micro) * micro,
            "micro_batch": micro,
            "lr": 1.0e-4,
            "schedule": "constant",
            "warmup": 0.0,
        },
        cluster={"workers": 1},
    )


def _our_trainer(job: dict[str, Any], settings: Config, store: Any) -> tuple[Trainer, SelfTest]:
    device, adapter = torch.device(job["device"]), settings.adapter
    model = random_llama(job["size"], getattr(torch, job["dtype"]), device)
    loss: Any = SupervisedLoss(model)
    if job["recompute"]:
        if not hasattr(loss, "recompute"):
            raise SystemExit("this version of the project does not recompute activations")
        loss.recompute = True  # place_model reads it
    tested = choose_attention(loss, store[:4], settings, device)
    targets = find_targets(model, adapter.targets, adapter.rank)
    factors, _ = initialise(targets, adapter.method, adapter.rank, 0, device, options_of(adapter))
    adapted = inject(model, at_scale(factors, adapter), adapter.scale())
    place_model(loss, "ddp", device)
    return Trainer(loss, adapted, settings, device), tested


def peft(job: dict[str, Any]) -> Found:
    """Run a pass of PEFT's LoRA with transformers' Trainer over the same chats, batches grouped by length.

    The start is LoRA's, because OLoRA's takes minutes in PEFT and does not change the speed.
    """
    from transformers.utils.import_utils import is_flash_attn_2_available

    device, dtype = torch.device(job["device"]), getattr(torch, job["dtype"])
    flash = device.type == "cuda" and is_flash_attn_2_available()
    model = _lora(random_llama(job["size"], dtype, device, "flash_attention_2" if flash else "sdpa"), job["rank"])
    rows = _rows(job)
    longest = sorted(rows, key=lambda row: -len(row[0]))
    _trainer(model, longest[: int(job["batch"])], job).train()  # warms up, and meets the largest batch
    trainer = _trainer(model, rows, job)
    seconds = timed(trainer.train, device)
    found = _speed(len(rows), sum(len(ids) for ids, _ in rows), seconds, device)
    return found | {"attention": model.config._attn_implementation, "recomputed": job["recompute"]}


def _lora(model: Any, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    model.config.use_cache = False
    wanted = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    # Adapters in the base model's precision, because that is the faster one of PEFT's two modes.
    return get_peft_model(model, wanted, autocast_adapter_dtype=False)


def _trainer(model: Any, rows: list[Row], job: dict[str, Any]) -> Any:
    from transformers import PrinterCallback, TrainingArguments
    from transformers import Trainer as TheirTrainer

    batch = int(job["batch"])
    mean = sum(len(ids) for ids, _ in rows) / len(rows)
    told = arguments(Setting("PEFT", "peft", micro=batch), {"scratch": tempfile.gettempdir()}, False, len(rows))
    told |= {
        "use_cpu": job["device"] == "cpu",
        "gradient_accumulation_steps": max(1, round(job["step_tokens"] / mean / batch)),
        "train_sampling_strategy": "group_by_length",
        **_recomputing(bool(job["recompute"])),
    }
    examples = [{"input_ids": ids.tolist(), "labels": np.where(marked, ids, -100).tolist()} for ids, marked in rows]
    trainer = TheirTrainer(model, TrainingArguments(**told), data_collator=pad, train_dataset=examples)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _recomputing(on: bool) -> dict[str, Any]:
    from transformers import TrainingArguments

    known = {field.name for field in fields(TrainingArguments)}
    name = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in known)
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}} if on else {}


def _peft_block(
    model: Any, targets: dict[str, Target], rank: int, device: torch.device
) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    from peft import LoraConfig, get_peft_model

    wanted = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights="olora")
    seconds = timed(lambda: get_peft_model(model, wanted), device)
    layers = {name: model.get_submodule(name) for name in targets}
    return {
        name: (layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach())
        for name, layer in layers.items()
    }, seconds


def _rows(job: dict[str, Any]) -> list[Row]:
    return chats(job["size"], job["length"], SIZES[job["size"]].pass_tokens)


def _speed(rows: int, tokens: int, seconds: float, device: torch.device) -> Found:
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device) / 2**30
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "rows": rows,
        "tokens": tokens,
        "seconds": seconds,
        "tokens a second": tokens / seconds,
        "GiB": memory,
    }
