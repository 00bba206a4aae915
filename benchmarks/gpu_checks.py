"""The checks of benchmarks/gpu.py: training on this device computes the right values.

The model is a small Llama with random weights and heads of 64 numbers, a size that all kernels support.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from common import config, memory_store
from gpu_models import Row, chats
from peers import model_of_peft, one_by_one
from torch import Tensor

from olora_ray.adapter.initialise import at_scale, initialise, options_of
from olora_ray.adapter.inject import find_targets, inject
from olora_ray.common.errors import UserError
from olora_ray.config.schema import Config, Model
from olora_ray.model import attention
from olora_ray.model.load import load_model
from olora_ray.tokens.collate import collate
from olora_ray.tokens.plan import Pack
from olora_ray.train.loop import Trainer
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.parallel import place_model
from olora_ray.train.self_test import choose_attention

LENGTH, RANK = 96, 8
LIMITS = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest relative difference of two gradients that rounding can cause."""
Found = dict[str, Any]
"""`ok`, and the measured values."""


def checks(device: torch.device) -> dict[str, Found]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(small_llama(Path(scratch)))
        done: dict[str, Found] = {}
        for dtype in ("float32", "bfloat16"):
            done[f"start equals the base, {dtype}"] = _guarded(lambda d=dtype: start_exact(folder, d, device))
            done |= {f"attention {name}, {dtype}": found for name, found in attentions(folder, dtype, device).items()}
            done[f"packed equals one by one, {dtype}"] = _guarded(lambda d=dtype: packed(folder, d, device))
        done["gradients equal PEFT's, float32"] = _guarded(lambda: like_peft(folder, device))
    return done


def start_exact(folder: str, dtype: str, device: torch.device) -> Found:
    """Check that adapters at their start leave the logits of the base model unchanged, to the bit."""
    settings = _settings(folder, dtype)
    model: Any = load_model(folder, settings.model, device).to(device)
    model.set_attn_implementation(attention.own(model))
    ids = torch.arange(5, 5 + LENGTH, device=device)[None]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        _trainer(model, settings, device)
        found = model(ids, use_cache=False).logits
    return {"ok": torch.equal(found, expected), "difference": float((found - expected).abs().max())}


def attentions(folder: str, dtype: str, device: torch.device) -> dict[str, Found]:
    """Return the verdict of the self-test on each attention kernel, and the choice of `auto`."""
    names = get_args(Model.model_fields["attention"].annotation)
    return {name: _guarded(lambda n=name: attention_of(n, folder, dtype, device)) for name in names}


def attention_of(name: str, folder: str, dtype: str, device: torch.device) -> Found:
    settings = _settings(folder, dtype, attention=name)
    try:
        model: Any = load_model(folder, settings.model, device).to(device)
        return {"ok": True, **choose_attention(SupervisedLoss(model), _packs(), settings, device).to_json()}
    except UserError as error:  # not there, or not right and said so: both are what a user would meet
        return {"ok": name != "auto", "refused": str(error)}


def packed(folder: str, dtype: str, device: torch.device) -> Found:
    """Check that the gradient over packed sequences is the sum of the gradients of their examples."""
    trainer, name = _tested(folder, dtype, device)
    whole = gradient(trainer, [_packs()], name)
    apart = gradient(trainer, [[single] for single in _apart(_packs())], name)
    return compared(whole, apart, dtype) | {"attention": name}


def like_peft(folder: str, device: torch.device) -> Found:
    """Check that the gradient over packed sequences equals PEFT's over single rows, on a CPU."""
    trainer, name = _tested(folder, "float32", device)
    found = gradient(trainer, [_packs()], name)
    expected = one_by_one(model_of_peft(folder, torch.float32, RANK), _rows())
    return compared(found, expected, "float32") | {"attention": name}


def gradient(trainer: Trainer, groups: Sequence[Sequence[Pack]], name: str) -> dict[str, Tensor]:
    parts = {
        f"{layer}.{part}": getattr(adapter, part) for layer, adapter in trainer.adapted.items() for part in ("da", "db")
    }
    for part in parts.values():
        part.grad.zero_()
    count = sum(int(pack.supervised.sum()) for group in groups for pack in group)
    for group in groups:
        (trainer.loss(collate(group, name).to(trainer.device)) / count).backward()
    return {layer: part.grad.float().cpu().clone() for layer, part in parts.items()}


def compared(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: str) -> Found:
    """Return whether two gradients agree within the precision."""
    assert found.keys() == expected.keys(), "other parameters have a gradient"
    off = sum(float((found[name].double() - part.double()).square().sum()) for name, part in expected.items())
    size = sum(float(part.double().square().sum()) for part in expected.values())
    difference = (off / size) ** 0.5
    return {"ok": difference <= LIMITS[dtype], "difference": difference, "limit": LIMITS[dtype]}


def _tested(folder: str, dtype: str, device: torch.device) -> tuple[Trainer, str]:
    settings = _settings(folder, dtype)
    model: Any = load_model(folder, settings.model, device)
    trainer = _trainer(model, settings, device, before=lambda loss: choose_attention(loss, _packs(), settings, device))
    return trainer, model.config._attn_implementation


def _trainer(
    model: Any, settings: Config, device: torch.device, before: Callable[[SupervisedLoss], object] = lambda loss: None
) -> Trainer:
    adapter, loss = settings.adapter, SupervisedLoss(model)
    loss.to(device)
    before(loss)
    targets = find_targets(model, adapter.targets, adapter.rank)
    factors, _ = initialise(targets, adapter.method, adapter.rank, 0, device, options_of(adapter))
    adapted = inject(model, at_scale(factors, adapter), adapter.scale())
    place_model(loss, "ddp", device)
    return Trainer(loss, adapted, settings, device)


def _settings(folder: str, dtype: str, **model: str) -> Config:
    return config(
        folder,
        {"name": folder, "dtype": dtype, **model},
        adapter={"rank": RANK, "alpha": RANK},
        train={"global_batch": 2, "micro_batch": 2},
        cluster={"workers": 1},
    )


def _rows() -> list[Row]:
    return chats("tiny", LENGTH, 4 * LENGTH)


def _packs() -> list[Pack]:
    return list(memory_store(_rows(), LENGTH))


def _apart(packs: Sequence[Pack]) -> list[Pack]:
    singles = []
    for pack in packs:
        place = 0
        for length in pack.segments:
            part = slice(place, place + length)
            singles.append(Pack(pack.input_ids[part], pack.supervised[part], (length,)))
            place += length
    return singles


def small_llama(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    torch.manual_seed(5)
    LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


def _guarded(check: Callable[[], Found]) -> Found:
    try:
        return check()
    except Exception as error:
        return {"ok": False, "failed": f"{type(error).__name__}: {error}"[:300]}
