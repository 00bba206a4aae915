"""The checks of benchmarks/gpu.py: training on this device computes the right values.

The model is a small Llama with random weights and heads of 64 numbers, a size that all kernels support.
"""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from common import config, memory_store
from gpu_models import Row, chats
from multiplications import timed
from peers import model_of_peft, one_by_one
from torch import Tensor

from olora_ray.adapter.initialise import at_scale, initialise, options_of
from olora_ray.adapter.inject import find_targets, inject
from olora_ray.common.errors import UserError
from olora_ray.config.schema import Config, Model
from olora_ray.model import attention
from olora_ray.model.load import load_model
from olora_ray.model.quantised import KINDS, pack
from olora_ray.tokens.collate import collate
from olora_ray.tokens.plan import Pack
from olora_ray.train import checkpoint
from olora_ray.train.checkpoint import TrainState
from olora_ray.train.loader import Schedule, StepLoader
from olora_ray.train.loop import Trainer
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.parallel import place_model
from olora_ray.train.self_test import choose_attention

LENGTH, RANK, STEPS = 96, 8, 2
LIMITS = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest relative difference of two gradients that rounding can cause."""
Found = dict[str, Any]
"""`ok`, and the measured values."""


def checks(job: Found) -> dict[str, Found]:
    """Check the start, each attention, packed examples, and PEFT's gradient."""
    device = torch.device(job["device"])
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(small_llama(Path(scratch)))
        done: dict[str, Found] = {}
        for dtype in ("float32", "bfloat16"):
            done[f"start equals the base, {dtype}"] = _guarded(
                lambda d=dtype: start_exact(folder, d, device)
            )
            done |= {
                f"attention {name}, {dtype}": found
                for name, found in attentions(folder, dtype, device).items()
            }
            done[f"packed equals one by one, {dtype}"] = _guarded(
                lambda d=dtype: packed(folder, d, device)
            )
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
        return {
            "ok": True,
            **choose_attention(SupervisedLoss(model), _packs(), settings, device).to_json(),
        }
    except (
        UserError
    ) as error:  # not there, or not right and said so: both are what a user would meet
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
        f"{layer}.{part}": getattr(adapter, part)
        for layer, adapter in trainer.adapted.items()
        for part in ("da", "db")
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
    off = sum(
        float((found[name].double() - part.double()).square().sum())
        for name, part in expected.items()
    )
    size = sum(float(part.double().square().sum()) for part in expected.values())
    difference = (off / size) ** 0.5
    return {"ok": difference <= LIMITS[dtype], "difference": difference, "limit": LIMITS[dtype]}


def _tested(folder: str, dtype: str, device: torch.device) -> tuple[Trainer, str]:
    settings = _settings(folder, dtype)
    model: Any = load_model(folder, settings.model, device)
    trainer = _trainer(
        model,
        settings,
        device,
        before=lambda loss: choose_attention(loss, _packs(), settings, device),
    )
    return trainer, model.config._attn_implementation


def _trainer(
    model: Any,
    settings: Config,
    device: torch.device,
    before: Callable[[SupervisedLoss], object] = lambda loss: None,
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
    for whole in packs:
        place = 0
        for length in whole.segments:
            part = slice(place, place + length)
            singles.append(Pack(whole.input_ids[part], whole.supervised[part], (length,)))
            place += length
    return singles


def codes(job: Found) -> dict[str, Found]:
    """Check that a weight packed on this device has the CPU's codes, and that both are unpacked to the same weight."""
    device, found = torch.device(job["device"]), dict[str, Found]()
    weight = torch.randn(1024, 1536, generator=torch.Generator().manual_seed(3))
    for kind, use in KINDS.items():

        def compare(kind: str = kind, use: Any = use) -> Found:
            here, there = (pack(weight, kind, on) for on in (device, torch.device("cpu")))
            equal = all(torch.equal(a.cpu(), b) for a, b in zip(here, there, strict=True))
            unpacked = [
                use.unpack(*parts, weight.shape, torch.float32).float().cpu()
                for parts in (here, there)
            ]
            return {"ok": equal, "difference": float((unpacked[0] - unpacked[1]).abs().max())}

        found[f"codes of {kind}"] = _guarded(compare)
    return found


def heads(job: Found) -> dict[str, Found]:
    """Return the verdict of the self-test on `auto` at several sizes of a head."""
    device, found = torch.device(job["device"]), dict[str, Found]()
    for size in (64, 80, 96, 128, 256):
        with tempfile.TemporaryDirectory() as scratch:
            folder = str(small_llama(Path(scratch), head_dim=size))
            name = f"heads of {size}, {job['dtype']}"
            found[name] = _guarded(
                lambda folder=folder: attention_of("auto", folder, job["dtype"], device)
            )
    return found


def twice(job: Found) -> dict[str, Found]:
    """Check whether the same steps give the same bits; with torch's deterministic algorithms they must."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    device, found = torch.device(job["device"]), dict[str, Found]()
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(small_llama(Path(scratch)))
        for name, wanted in (
            ("the same run twice", False),
            ("the same run twice, deterministic", True),
        ):

            def run(wanted: bool = wanted) -> Found:
                torch.use_deterministic_algorithms(wanted)
                first, second = (
                    _trained(folder, job["dtype"], device)[0].flat.vector for _ in range(2)
                )
                same = torch.equal(first, second)
                told = "the same bits" if same else "other bits"
                return {
                    "ok": same or not wanted,
                    "difference": float((first - second).abs().max()),
                    "told": told,
                }

            found[name] = _guarded(run)
    torch.use_deterministic_algorithms(False)
    return found


def elsewhere(job: Found) -> dict[str, Found]:
    """Check that a checkpoint of this device resumes here with the same loss, and on a CPU with nearly the same."""

    def run() -> Found:
        device, host = torch.device(job["device"]), torch.device("cpu")
        with tempfile.TemporaryDirectory() as scratch:
            folder = str(small_llama(Path(scratch) / "model"))
            trainer, name = _trained(folder, job["dtype"], device)
            trainer.snapshot(TrainState(step=STEPS), None, {}, "")(Path(scratch) / "checkpoint")
            (expected,) = _steps(trainer, name, STEPS, 1)
            source = checkpoint.load(Path(scratch) / "checkpoint")
            losses = []
            for on in (device, host):
                other, name = _tested(folder, job["dtype"], on)
                parts = {f"{layer}.da": each.da for layer, each in source.adapter.items()}
                parts |= {f"{layer}.db": each.db for layer, each in source.adapter.items()}
                other.flat.load(other.flat.vector, parts)
                other.optimizer.load(source.optimizer, STEPS)
                losses += _steps(other, name, STEPS, 1)
        off = abs(losses[1] - expected) / abs(expected)
        same = (
            "the same loss here"
            if losses[0] == expected
            else f"here {losses[0]} instead of {expected}"
        )
        return {"ok": off < LIMITS[job["dtype"]], "difference": off, "told": same}

    return {f"a checkpoint on another device, {job['dtype']}": _guarded(run)}


def folder(job: Found) -> dict[str, Found]:
    """Time a worker's start from a folder in bfloat16: reading the weights, placing them, the factors."""

    def run() -> Found:
        device, seconds = torch.device(job["device"]), dict[str, float]()
        with tempfile.TemporaryDirectory() as scratch:
            wide = {"hidden_size": 2048, "intermediate_size": 8192} if device.type == "cuda" else {}
            path = str(small_llama(Path(scratch), dtype=torch.bfloat16, **wide))
            settings = _settings(path, "bfloat16")
            loaded: list[Any] = []
            seconds["read"] = timed(
                lambda: loaded.append(load_model(path, settings.model, device)), device
            )
            model = loaded[0]
            targets = find_targets(model, "all-linear", RANK)
            seconds["factors"] = timed(
                lambda: initialise(targets, "olora", RANK, 0, device), device
            )
            seconds["place"] = timed(lambda: model.to(device), device)
        return {
            "ok": True,
            "told": ", ".join(f"{name} {spent:.2f} s" for name, spent in seconds.items()),
        }

    return {"start from a folder": _guarded(run)}


def alone(job: Found) -> dict[str, Found]:
    """Check the exchange of gradients and factors in a group of one worker, over NCCL on a GPU."""

    def run() -> Found:
        device = torch.device(job["device"])
        with tempfile.TemporaryDirectory() as scratch:
            path = str(small_llama(Path(scratch) / "model"))
            expected = _trained(path, job["dtype"], device)[0].flat.vector
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(
                backend, init_method=f"file://{scratch}/group", rank=0, world_size=1
            )
            try:
                found = _trained(path, job["dtype"], device)[0].flat.vector
                dist.all_reduce(torch.ones(8, device=device))
            finally:
                dist.destroy_process_group()
        off = float((found - expected).abs().max())
        return {"ok": off <= LIMITS[job["dtype"]], "difference": off, "told": backend}

    return {"a group of one worker": _guarded(run)}


def _trained(folder: str, dtype: str, device: torch.device) -> tuple[Trainer, str]:
    trainer, name = _tested(folder, dtype, device)
    _steps(trainer, name, 0, STEPS)
    return trainer, name


def _steps(trainer: Trainer, name: str, first: int, count: int) -> list[float]:
    settings, store = trainer.config, memory_store(_rows(), LENGTH)
    train = settings.train.model_copy(update={"steps": STEPS + 1})
    loader = StepLoader(store, train, settings.run.seed, name)
    return [
        result.loss
        for result in islice(trainer.steps(loader, first, Schedule(train, store)), count)
    ]


def small_llama(folder: Path, dtype: torch.dtype = torch.float32, **changes: int) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.05,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    torch.manual_seed(5)
    LlamaForCausalLM(LlamaConfig(**shape | changes)).to(dtype).save_pretrained(folder)
    return folder


def _guarded(check: Callable[[], Found]) -> Found:
    try:
        return check()
    except Exception as error:
        return {"ok": False, "failed": f"{type(error).__name__}: {error}"[:300]}


CHECKS = {
    "checks": checks,
    "codes": codes,
    "heads": heads,
    "twice": twice,
    "elsewhere": elsewhere,
    "folder": folder,
    "alone": alone,
}
"""Kind of a job -> function that returns name -> what it checked."""
