"""The measurements of benchmarks/gpu.py: the factors, and training passes of ours, of PEFT with transformers' Trainer,
and of TRL, over the same chats."""

import math
import os
import resource
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import fields
from itertools import islice
from typing import Any

import numpy as np
import torch
from common import config, decided, memory_store
from contestants import Setting
from gpu_models import SIZES, Row, chats, random_model
from multiplications import needed, shapes_of, timed, wait
from peers import arguments, pad
from torch import Tensor

from olora_ray.adapter.initialise import at_scale, initialise, options_of, weight_sizes
from olora_ray.adapter.inject import Target, find_targets, inject
from olora_ray.adapter.optimizers.optimizer import optimizer_named
from olora_ray.config.decided import DecidedConfig, Expected
from olora_ray.config.schema import Config
from olora_ray.model import attention
from olora_ray.model.quantised import QuantisedLinear
from olora_ray.tokens.collate import collate
from olora_ray.tokens.store import order
from olora_ray.train import price
from olora_ray.train.estimate import COPIES, measure
from olora_ray.train.loader import Schedule, StepLoader
from olora_ray.train.loop import Trainer
from olora_ray.train.loss import SelfTest, SupervisedLoss
from olora_ray.train.parallel import packed_size, place_model, to_pack
from olora_ray.train.self_test import choose_attention

Found = dict[str, Any]


def initialisation(job: dict[str, Any]) -> Found:
    """Return seconds for the factors of the complete model, and of its first block beside PEFT's."""
    device, rank = torch.device(job["device"]), int(job["rank"])
    model = random_model(job["size"], getattr(torch, job["dtype"]), device)
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
    """Run a timed pass; `attention` and `quantization` of the job are those of the config's section `model`."""
    device, store = torch.device(job["device"]), memory_store(_rows(job), job["length"])
    settings = settings_of(job)
    trainer, tested, packing = trainer_of(job, settings, store)
    steps = -(-len(store) // settings.train.global_batch)

    def one_pass() -> Iterator[Any]:
        loader = StepLoader(store, settings.train, settings.run.seed, tested.attention)
        return trainer.steps(
            loader, 0, Schedule(settings.train.model_copy(update={"steps": steps}), store)
        )

    deque(islice(one_pass(), 1), maxlen=0)  # warms up
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = timed(lambda: deque(one_pass(), maxlen=0), device)
    places = order(len(store), settings.run.seed, 0, steps * settings.train.global_batch)
    done = [store[int(place)] for place in places]
    lengths = [length for pack in done for length in pack.segments]
    size, work = _planned(job, settings)
    found = {
        **_speed(len(lengths), sum(lengths), seconds, device),
        "planned GiB": size / 2**30,
        "attention": tested.attention,
        "passed over": dict(tested.passed_over),
        **({"packed in seconds": packing} if packing else {}),
    }
    card = price.card_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if card and "quantization" not in job:
        step = price.step_time(work, card)
        found["planned tokens a second"] = job["batch"] * job["length"] / step.seconds
    if not SIZES[job["size"]].experts:
        shapes = shapes_of(trainer, collate(store[:1], tested.attention))
        work = needed(shapes, lengths, sum(int(pack.supervised.sum()) for pack in done))
        found["operations a token"] = sum(work.values()) / sum(lengths)
    return found


def profile(job: dict[str, Any]) -> Found:
    """Return class of work -> seconds on the device in the forward and backward pass of one micro-batch."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    device, store = torch.device(job["device"]), memory_store(_rows(job), job["length"])
    trainer, tested, _ = trainer_of(job, settings_of(job), store)
    batch = collate(store[: job["batch"]], tested.attention).to(device)
    trainer.loss(batch).backward()  # warms up
    wait(device)
    on_gpu = device.type == "cuda"
    whole = timed(lambda: trainer.loss(batch).backward(), device)
    with profiler(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        trainer.loss(batch).backward()
        wait(device)
    spent = dict.fromkeys(CLASSES, 0.0) | {"the rest": 0.0}
    for each in found.key_averages():
        name = next(
            (name for name, parts in CLASSES.items() if any(p in each.key.lower() for p in parts)),
            "the rest",
        )
        spent[name] += (each.self_device_time_total if on_gpu else each.self_cpu_time_total) / 1e6
    spent["idle"] = max(0.0, whole - sum(spent.values()))  # in a pass that no profiler slows down
    return spent


CLASSES = {
    "attention": ("flash", "fmha", "attention", "varlen"),
    "products": ("gemm", "nvjet", "xmma", "cutlass", "cublas", "::mm", "addmm", "bmm", "::linear"),
    "copies": ("memcpy", "memset", "copy", "::cat", "catarray"),
    "elementwise and sums": (
        "elementwise",
        "reduce",
        "softmax",
        "norm",
        "::mul",
        "::add",
        "silu",
        "::sum",
        "::pow",
    ),
}
"""Class of work -> parts of the names of its kernels; the first that fits."""


def _planned(job: dict[str, Any], settings: DecidedConfig) -> tuple[float, price.Work]:
    """Return the bytes of the project's plan for this training, and the work of a micro-batch."""
    dtype = getattr(torch, job["dtype"])
    model = random_model(job["size"], dtype, torch.device("meta"))
    base: float = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    if kind := job.get("quantization"):
        numbers, packed, unpacked = packed_size(model, kind, dtype)
        base += packed + unpacked - numbers * dtype.itemsize
    targets = find_targets(model, settings.adapter.targets, settings.adapter.rank)
    whole = [target.whole_shape for target in targets.values()]
    trainable = sum(
        settings.adapter.rank * sum(shape[-2:]) * math.prod(shape[:-2]) for shape in whole
    )
    found = measure(
        model,
        targets,
        settings,
        Expected(job["device"] == "cuda", job["dtype"], settings.model.attention),
    )
    # Beside the copies: the factors A0 and B0.
    return base + 4 * trainable * (COPIES + 2) + found.step, found.work


def settings_of(job: dict[str, Any]) -> DecidedConfig:
    micro = int(job["batch"])
    asked = config(
        "unused",
        {"name": "unused", "dtype": job["dtype"], "attention": job.get("attention", "auto")},
        adapter={"rank": job["rank"], "alpha": job["rank"]},
        data={"train": [{"path": "unused.jsonl"}], "max_length": job["length"]},
        train={
            "global_batch": max(1, job["step_tokens"] // job["length"] // micro) * micro,
            "micro_batch": micro,
            "lr": 1.0e-4,
            "schedule": "constant",
            "warmup": 0.0,
            "activation_checkpointing": job["recompute"],
            "optimizer": job.get("optimizer", "adamw"),
        },
        cluster={"workers": 1},
    )
    return decided(asked)


def trainer_of(
    job: dict[str, Any], settings: Config, store: Any
) -> tuple[Trainer, SelfTest, float]:
    """Return the trainer, the verdict on its attention, and the seconds in which the base was packed."""
    device, adapter = torch.device(job["device"]), settings.adapter
    if job.get("deterministic"):  # as a worker's prepare_device
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
        torch.use_deterministic_algorithms(True)
    attention.register()  # a worker's load_model does it
    model = random_model(job["size"], getattr(torch, job["dtype"]), device)
    kind = job.get("quantization")
    packing = timed(lambda: _pack(model, kind, device), device) if kind else 0.0
    loss: Any = SupervisedLoss(model)
    loss.recompute = job["recompute"]  # place_model reads it
    tested = choose_attention(loss, store[:4], settings, device)
    targets = find_targets(model, adapter.targets, adapter.rank)
    factors, _ = initialise(targets, adapter.method, adapter.rank, 0, device, options_of(adapter))
    adapted = inject(model, at_scale(factors, adapter), adapter.scale())
    place_model(loss, "ddp", device)
    sizes = {}
    if optimizer_named(settings.train.optimizer).sizes:
        sizes = weight_sizes(targets, device)
    return Trainer(loss, adapted, settings, device, sizes=sizes), tested, packing


def _pack(model: Any, kind: str, device: torch.device) -> None:
    for name in to_pack(model):
        parent, _, attribute = name.rpartition(".")
        layer = model.get_submodule(name)
        setattr(
            model.get_submodule(parent),
            attribute,
            QuantisedLinear(layer.weight, layer.bias, kind, device),
        )


def peft(job: dict[str, Any]) -> Found:
    """Run a pass of PEFT's LoRA with transformers' Trainer over the same chats, batches grouped by length.

    The start is LoRA's, because OLoRA's takes minutes in PEFT and does not change the speed.
    """
    from transformers.utils.import_utils import is_flash_attn_2_available

    device, dtype = torch.device(job["device"]), getattr(torch, job["dtype"])
    flash = device.type == "cuda" and is_flash_attn_2_available()
    model = _lora(
        random_model(job["size"], dtype, device, "flash_attention_2" if flash else "sdpa"),
        job["rank"],
    )
    rows = _rows(job)
    longest = sorted(rows, key=lambda row: -len(row[0]))
    _trainer(
        model, longest[: int(job["batch"])], job
    ).train()  # warms up, and meets the largest batch
    trainer = _trainer(model, rows, job)
    seconds = timed(trainer.train, device)
    found = _speed(len(rows), sum(len(ids) for ids, _ in rows), seconds, device)
    return found | {"attention": model.config._attn_implementation}


def trl(job: dict[str, Any]) -> Found:
    """Run a pass of TRL's SFTTrainer over the same chats, packed; without flash-attn its examples see each other."""
    from transformers import TrainerCallback
    from transformers.utils.import_utils import is_flash_attn_2_available
    from trl import SFTConfig, SFTTrainer

    device, rows = torch.device(job["device"]), _rows(job)
    flash = device.type == "cuda" and is_flash_attn_2_available()
    model = random_model(
        job["size"], getattr(torch, job["dtype"]), device, "flash_attention_2" if flash else "sdpa"
    )
    told = arguments(
        Setting("TRL", "trl", micro=job["batch"]),
        {"scratch": tempfile.gettempdir()},
        False,
        len(rows),
    )
    told["gradient_accumulation_steps"] = max(
        1, job["step_tokens"] // job["length"] // job["batch"]
    )
    told |= {
        "use_cpu": job["device"] == "cpu",
        "bf16": False,
        **_recomputing(bool(job["recompute"])),
    }
    trainer = SFTTrainer(
        _lora(model, job["rank"]),
        args=SFTConfig(**told, max_length=job["length"], packing=True, completion_only_loss=True),
        train_dataset=_dataset(rows),
        processing_class=_no_tokenizer(),
    )
    spans: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **others: Any) -> None:
            wait(device)
            spans.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.train()
    if len(spans) < 2:
        raise SystemExit(
            "a pass has fewer than two steps: none is left after the first, which warms up"
        )
    tokens = sum(len(ids) for ids, _ in rows) * (len(spans) - 1) // len(spans)
    return _speed(len(rows), tokens, spans[-1] - spans[0], device) | {
        "attention": model.config._attn_implementation
    }


def _dataset(rows: list[Row]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(
        [
            {"input_ids": ids.tolist(), "completion_mask": marked.astype(int).tolist()}
            for ids, marked in rows
        ]
    )


def _no_tokenizer() -> Any:
    """Return a tokenizer of single words: TRL wants one, and asks it for the tokens of padding and of the end."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<end>", unk_token="<unk>"
    )


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
    told = arguments(
        Setting("PEFT", "peft", micro=batch), {"scratch": tempfile.gettempdir()}, False, len(rows)
    )
    told |= {
        "use_cpu": job["device"] == "cpu",
        "gradient_accumulation_steps": max(1, round(job["step_tokens"] / mean / batch)),
        "train_sampling_strategy": "group_by_length",
        **_recomputing(bool(job["recompute"])),
    }
    examples = [
        {"input_ids": ids.tolist(), "labels": np.where(marked, ids, -100).tolist()}
        for ids, marked in rows
    ]
    trainer = TheirTrainer(
        model, TrainingArguments(**told), data_collator=pad, train_dataset=examples
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _recomputing(on: bool) -> dict[str, Any]:
    from transformers import TrainingArguments

    known = {field.name for field in fields(TrainingArguments)}
    name = next(
        name for name in ("activation_checkpointing", "gradient_checkpointing") if name in known
    )
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}} if on else {}


def _peft_block(
    model: Any, targets: dict[str, Target], rank: int, device: torch.device
) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    from peft import LoraConfig, get_peft_model

    wanted = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights="olora"
    )
    seconds = timed(lambda: get_peft_model(model, wanted), device)
    layers = {name: model.get_submodule(name) for name in targets}
    return {
        name: (layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach())
        for name, layer in layers.items()
    }, seconds


def _rows(job: dict[str, Any]) -> list[Row]:
    return chats(job["size"], job["length"], SIZES[job["size"]].pass_tokens)


def _speed(rows: int, tokens: int, seconds: float, device: torch.device) -> Found:
    of_card = {}
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device) / 2**30
        free, total = torch.cuda.mem_get_info(device)
        of_card["reserved GiB"] = torch.cuda.max_memory_reserved(device) / 2**30
        of_card["used GiB"] = (total - free) / 2**30
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        **of_card,
        "rows": rows,
        "tokens": tokens,
        "seconds": seconds,
        "tokens a second": tokens / seconds,
        "GiB": memory,
    }
