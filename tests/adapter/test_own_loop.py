"""adapt(): OLoRA in a bare loop, in transformers' Trainer and with accelerate, without Ray, config or MLflow."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from olora_ray.adapter import adapt
from olora_ray.adapter.methods import from_weights
from olora_ray.common.errors import UserError
from olora_ray.train.loss import SupervisedLoss
from tests import tiny

IDS = torch.randint(2, tiny.VOCABULARY, (4, 2, 12), generator=torch.Generator().manual_seed(5))
LR = 0.01


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in IDS]


def bare_loop(model: Any, optimizer: torch.optim.Optimizer, given: Any = None) -> list[float]:
    losses = []
    for batch in given or batches():
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS[0]).logits
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", from_weights())
def test_start_is_the_base_and_the_saved_folder_says_what_was_trained(
    method: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny.llama(dtype=dtype)
    untouched = copy.deepcopy(model)
    before = logits(model)
    adapter = adapt(model, method, rank=4, alpha=8)
    assert torch.equal(logits(model), before)
    trained = [name for name, part in model.named_parameters() if part.requires_grad]
    assert trained
    assert all(name.endswith((".da", ".db")) for name in trained)
    losses = bare_loop(model, adapter.optimizer("adamw", lr=LR), batches()[:1] * 4)
    assert losses[-1] < losses[0]
    adapter.save(tmp_path / "saved")
    after = logits(model)
    assert not torch.equal(after, before)
    read = PeftModel.from_pretrained(untouched, tmp_path / "saved")
    torch.testing.assert_close(
        logits(read), after, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0
    )
    adapter.remove()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("optimizer", ["adamw", "preconditioned", "spectral"])
def test_losses_are_those_of_the_pipeline(optimizer: str) -> None:
    config = tiny.config(
        train__optimizer=optimizer, train__lr=LR, train__schedule="constant", train__clip=None
    )
    packs = tiny.store()
    trainer = tiny.trainer(config)
    model = tiny.llama(attention="segments")
    settings = trainer.config
    adapter = adapt(
        model,
        settings.adapter.method,
        settings.adapter.rank,
        settings.adapter.alpha,
        seed=settings.run.seed,
    )
    for name, layer in adapter.layers.items():
        same = trainer.adapted[name]
        assert torch.equal(layer.a0, same.a0)
        assert layer.b0 is None or torch.equal(layer.b0, same.b0)
    given = []
    trainer_step = trainer.step

    def step(number: int, data: Any, schedule: Any) -> Any:
        given.append(data)
        return trainer_step(number, data, schedule)

    trainer.step = step
    wanted = [result.loss for result in tiny.steps(trainer, packs, count=4)]
    loss_of = SupervisedLoss(model)
    step_of = adapter.optimizer(optimizer, lr=LR)
    losses = []
    for data in given:
        weight = trainer.objective.weight(data.whole)
        total = 0.0
        for batch in data.micro:
            loss = trainer.objective.loss(loss_of, batch, data.whole)[0] / weight
            loss.backward()
            total += loss.item()
        losses.append(total)
        step_of.step()
        step_of.zero_grad()
    assert losses == pytest.approx(wanted, rel=1e-5)


def test_trainer_resumes_from_its_own_checkpoint(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": ids, "labels": ids} for ids in IDS.flatten(0, 1)]

    def trained(folder: str, steps: int, resume: str | None = None) -> dict[str, torch.Tensor]:
        model = tiny.llama()
        adapter = adapt(model, rank=4)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=2,
            gradient_checkpointing=True,
            lr_scheduler_type="constant",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        optimizer = adapter.optimizer("spectral", lr=LR)
        trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=resume)
        return {name: layer.da.detach() for name, layer in adapter.layers.items()}

    whole = trained("whole", 4)
    assert all(part.any() for part in whole.values())
    resumed = trained("resumed", 4, str(tmp_path / "whole" / "checkpoint-2"))
    for name, part in whole.items():
        torch.testing.assert_close(resumed[name], part)


def test_accelerate_gives_the_losses_of_a_bare_loop() -> None:
    from accelerate import Accelerator

    losses = []
    for accelerated in (False, True):
        model = tiny.llama()
        optimizer: Any = adapt(model, rank=4).optimizer("spectral", lr=LR)
        if accelerated:
            accelerator = Accelerator(cpu=True)
            model, optimizer = accelerator.prepare(model, optimizer)
        losses.append(bare_loop(model, optimizer))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_autocast_trains_on_a_model_in_float32(family: str) -> None:
    model = tiny.llama()
    if family == "mixtral":
        model = tiny.of_kind(family, tiny.SMALL | {"num_local_experts": 4})
    optimizer = adapt(model, rank=4).optimizer("spectral", lr=LR)
    with torch.autocast("cpu", torch.bfloat16):
        losses = bare_loop(model, optimizer, batches()[:1] * 4)
    assert losses[-1] < losses[0]


def test_optimizer_keeps_its_moments_when_the_parameters_get_other_memory() -> None:
    losses = []
    for moved in (False, True):
        model = tiny.llama()
        optimizer = adapt(model, rank=4).optimizer("adamw", lr=LR, lr_ratio=2.0)
        first = bare_loop(model, optimizer)
        if moved:
            for part in model.parameters():
                part.data = part.data.clone()
        losses.append(first + bare_loop(model, optimizer))
    assert losses[0] == losses[1]


def test_a_foreign_optimizer_and_a_plain_module_work(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))
    adapter = adapt(model, "lora", rank=2, targets="0")
    optimizer = torch.optim.AdamW(part for part in model.parameters() if part.requires_grad)
    x = torch.rand(5, 12)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
    y = model(x)
    adapter.save(tmp_path)
    adapter.remove()
    torch.testing.assert_close(PeftModel.from_pretrained(model, tmp_path)(x), y)


def peft(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


def adapted(model: Any) -> Any:
    adapt(model, "lora", rank=2)
    return model


@pytest.mark.parametrize(
    ("change", "settings", "named"),
    [
        (adapted, {}, "model"),
        (peft, {}, "model"),
        (None, {"method": "eva"}, "method"),
        (None, {"method": "olara"}, "method"),
        (None, {"rank": 0}, "rank"),
        (None, {"dropout": 1.5}, "dropout"),
        (None, {"rank": 512}, "adapter.rank"),
        (None, {"targets": "no_layer"}, "adapter.targets"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_model_is_changed(
    change: Any, settings: dict[str, Any], named: str
) -> None:
    model = tiny.llama()
    if change is not None:
        model = change(model)
    layers = [type(module) for module in model.modules()]
    with pytest.raises(UserError) as caught:
        adapt(model, **settings)
    assert str(caught.value).startswith(named)
    assert [type(module) for module in model.modules()] == layers


PROGRAM = """
import sys
from torch import nn
from olora_ray.adapter import adapt
adapter = adapt(nn.Sequential(nn.Linear(8, 8)), rank=2)
adapter.optimizer("spectral")
found = sorted({name.partition(".")[0] for name in sys.modules})
adapter.save(sys.argv[1])
later = sorted({name.partition(".")[0] for name in sys.modules})
print(*found, "|", *later)
"""


@pytest.mark.lengthy
def test_adapt_imports_torch_alone(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "saved")],
        capture_output=True,
        text=True,
        check=True,
    )
    found, later = (set(part.split()) for part in done.stdout.split("|"))
    large = {"ray", "mlflow", "pydantic", "transformers", "peft", "datasets"}
    assert not found & {*large, "safetensors", "pyarrow"}
    assert not later & large
