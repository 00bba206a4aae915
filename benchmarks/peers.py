"""The peer of benchmarks/throughput.py: PEFT's OLoRA, trained by transformers' Trainer."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_A_STEP = 16
Row = tuple[np.ndarray, np.ndarray]
"""(input_ids, supervised)."""


def model_of_peft(folder: str, dtype: torch.dtype, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    model.config.use_cache = False
    lora = LoraConfig(
        r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights="olora"
    )
    return get_peft_model(model, lora, autocast_adapter_dtype=False)


def one_by_one(model: Any, rows: Sequence[Row]) -> dict[str, Tensor]:
    """Return the reference gradient: each row alone, with its loss by the plain formula."""
    count = sum(int(marked[1:].sum()) for _, marked in rows)
    for ids, marked in rows:
        tokens = torch.from_numpy(ids.astype(np.int64))
        places = torch.from_numpy(np.flatnonzero(marked[1:]))
        logits = model(input_ids=tokens[None]).logits[0, places].float()
        (F.cross_entropy(logits, tokens[places + 1], reduction="sum") / count).backward()
    return gradients_of(model)


def gradients_of(model: Any) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            layer, _, which = name.removeprefix("base_model.model.").partition(".lora_")
            found[f"{layer}.d{which[0].lower()}"] = parameter.grad.detach().clone()
    return found


def arguments(setting: Any, job: dict[str, Any], whole: bool, rows: int) -> dict[str, Any]:
    """Return the arguments of transformers' trainers; `whole`: one step over all rows, without clipping."""
    batches = max(1, ROWS_A_STEP // setting.micro // setting.workers)
    if whole:
        batches = rows
    return {
        "output_dir": job["scratch"],
        "per_device_train_batch_size": setting.micro,
        "gradient_accumulation_steps": batches,
        "num_train_epochs": 1,
        "learning_rate": 1.0e-4,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0 if whole else 1.0,
        "use_cpu": True,
        "report_to": [],
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,  # the default, True, is slower
    }


def peft_trainer(
    model: Any,
    rows: Sequence[Row],
    setting: Any,
    job: dict[str, Any],
    found: dict[str, Tensor] | None = None,
) -> Any:
    """Return transformers' trainer; `found` is given for one step over all rows, and gets its gradient."""
    from datasets import Dataset
    from transformers import Trainer, TrainerCallback, TrainingArguments

    examples = [
        {"input_ids": ids, "labels": np.where(marked, ids, -100), "length": len(ids)}
        for ids, marked in rows
    ]
    told = arguments(setting, job, found is not None, len(rows))
    trainer = Trainer(
        model,
        TrainingArguments(**told, train_sampling_strategy="group_by_length"),
        data_collator=pad,
        train_dataset=Dataset.from_list(examples),
    )

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *arguments: Any, model: Any = None, **others: Any) -> None:
            assert not found, "more than one step"
            assert found is not None
            found.update(gradients_of(model))

    if found is not None:
        trainer.add_callback(Keep())
    return trainer


def timed_training(trainer: Any) -> dict[str, float]:
    """Train; return wall-clock and CPU seconds without the setup before the first step."""
    from transformers import TrainerCallback

    marks: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *arguments: Any, **others: Any) -> None:
            marks.append((time.perf_counter(), time.process_time()))

        on_train_end = on_train_begin

    trainer.add_callback(Clock())
    trainer.train()
    (began, used), (ended, used_then) = marks
    return {"seconds": ended - began, "cpu": used_then - used}


def pad(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def stack(name: str, filler: int) -> Tensor:
        return torch.tensor(
            [list(row[name]) + [filler] * (longest - len(row[name])) for row in rows]
        )

    mask = torch.tensor(
        [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    )
    return {
        "input_ids": stack("input_ids", 0),
        "labels": stack("labels", -100),
        "attention_mask": mask,
    }
