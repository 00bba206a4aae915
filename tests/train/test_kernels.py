"""The kernels of a block compute what the families compute, and compile for GPUs that this machine does not have.

    PYTHONPATH=build/triton TRITON_INTERPRET=1 pytest tests/train/test_kernels.py    # computes, in Triton's interpreter
    PYTHONPATH=build/triton pytest tests/train/test_kernels.py                       # compiles

In float32: in bfloat16 the interpreter truncates, and proves nothing.
"""

import os
import re
import subprocess
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from olora_ray.config.decided import Recompute
from olora_ray.tokens.collate import collate
from olora_ray.train import parts
from olora_ray.train.loop import Trainer
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.self_test import check_adapters
from olora_ray.train.sharded_reader import decoder_layers
from tests import tiny
from tests.crew import Crews
from tests.families import zoo
from tests.families.variants import ALL
from tests.train.test_recompute import gradient, trainer

triton = pytest.importorskip("triton", reason="see above")
pytestmark = pytest.mark.slow
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
computes = pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1 is not set")
compiles = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 is set")
CPU = torch.device("cpu")
FAMILIES = {"llama": 8, "qwen3": 12, "gemma2": 1, "gpt2": 0, "qwen3_moe": 10}
"""Family -> parts that kernels compute in its two blocks and its last norm; its function of positions is one."""


def every(loss: SupervisedLoss) -> list[parts.Part]:
    return parts.find(loss, decoder_layers(loss.model))


def with_kernels(made: Trainer) -> list[parts.Part]:
    found = [part for part in every(made.loss) if not parts.problem(part, torch.float32, CPU)]
    made.loss.fused = found
    parts.switch(found, "cpu")
    return found


def off(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@computes
@pytest.mark.parametrize("recompute", [False, "swiglu", True])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_the_familys(family: str, recompute: Recompute) -> None:
    batch = collate([tiny.pack(9), tiny.pack(12, seed=1)], "sdpa")
    made = trainer(zoo.make(ALL[family]), recompute)
    plain = gradient(made, batch)
    found = with_kernels(made)
    try:
        assert len(found) == FAMILIES[family]
        fused = gradient(made, batch)
        with parts.plainly(made.loss):
            again = gradient(made, batch)
    finally:
        parts.switch(found, None)  # the function of positions is the process's
    tolerance = parts.TOLERANCE[torch.float32]
    assert off(fused[0], plain[0]) <= tolerance
    assert off(fused[1], plain[1]) <= tolerance
    assert torch.equal(again[1], plain[1])


@computes
def test_the_self_test_compares_them_with_the_familys_code() -> None:
    made = trainer(tiny.llama(attention="segments"), on=False)
    found = with_kernels(made)
    packs = [tiny.pack(9, 7), tiny.pack(12)]
    try:
        _, size = check_adapters(made.loss, made.adapted, packs, "segments", CPU, new=False)
        assert 0 < size < 1e-5
    finally:
        parts.switch(found, None)


def _steps(strategy: str, kernels: bool) -> tuple[list[float], Tensor]:
    settings = tiny.decided(
        cluster__workers=2,
        cluster__strategy=strategy,
        train__micro_batch=1,
        train__activation_checkpointing="swiglu",
    )
    made = tiny.moved(tiny.trainer(settings, strategy=strategy))
    if kernels:
        assert len(with_kernels(made)) == FAMILIES["llama"]
    losses = [result.loss for result in tiny.steps(made, count=2)]
    parts.switch(made.loss.fused or [], None)
    return losses, made.flat.vector.clone()


@computes
def test_a_sharded_base_has_the_same_bits_and_the_familys_losses(crew: Crews) -> None:
    losses, vector = crew(2).run(_steps, "ddp", True)[0]
    for found in crew(2).run(_steps, "fsdp", True):
        assert found[0] == losses
        assert torch.equal(found[1], vector)
    assert losses == pytest.approx(crew(2).run(_steps, "ddp", False)[0][0], rel=1e-5)


OPERATORS = ("rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "rotate")


@computes
@pytest.mark.parametrize("name", OPERATORS)
def test_a_kernel_that_errs_is_not_used(name: str) -> None:
    from olora_ray.train import kernels

    class Wrong:
        """A kernel whose second output, or only one, is 0.1 % too large."""

        def __getitem__(self, programs: Any) -> Any:
            return partial(self.run, right[programs])

        def run(self, run: Any, *given: Any, **named: Any) -> None:
            run(*given, **named)
            [each for each in given if isinstance(each, Tensor)][-1].mul_(1.001)

    right = getattr(kernels, name)
    loss = SupervisedLoss(tiny.llama())
    with mock.patch.object(kernels, name, Wrong()):
        wrong = [part for part in every(loss) if parts.problem(part, torch.float32, CPU)]
    assert len(wrong) == {"rms_norm": 5, "swiglu": 2, "rotate": 1}[name.removesuffix("_backward")]


# What is compiled: for a model of 8B in bfloat16, and for wider norms.

TARGETS = {
    "A100": ("cuda", 80, 32),
    "H100": ("cuda", 90, 32),
    "B200": ("cuda", 100, 32),
    "RTX 5090": ("cuda", 120, 32),
    "MI300X": ("hip", "gfx942", 64),
}
ROW = {"x": "*bf16", "weight": "*bf16", "r": "*fp32"}
FLAT = {"gate": "*bf16", "up": "*bf16"}
TURN = {"x": "*bf16", "cos": "*bf16", "sin": "*bf16", "y": "*bf16", "heads": "i32", "size": "i32"}
KERNELS: list[tuple[str, dict[str, str], dict[str, Any], int]] = [
    *[
        each
        for block, warps in ((128, 1), (4096, 8), (8192, 16))
        for each in (
            ("rms_norm", ROW | {"y": "*bf16", "eps": "fp32"}, {"BLOCK": block}, warps),
            (
                "rms_norm_backward",
                ROW | {"grad": "*bf16", "grad_x": "*bf16"},
                {"BLOCK": block},
                warps,
            ),
        )
    ],
    ("swiglu", FLAT | {"product": "*bf16"}, {"BLOCK": 2048}, 4),
    (
        "swiglu_backward",
        FLAT | {"grad": "*bf16", "grad_gate": "*bf16", "grad_up": "*bf16"},
        {"BLOCK": 2048},
        4,
    ),
    ("rotate", TURN, {"BACK": False, "BLOCK": 2048}, 4),
    ("rotate", TURN, {"BACK": True, "BLOCK": 2048}, 4),
]


@compiles
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_and_spill_nothing(target: str, tmp_path: Path) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from olora_ray.train import kernels

    for name, types, constants, warps in KERNELS:
        kernel = getattr(kernels, name)
        signature = {
            each: types.get(each, "i32" if each == "n" else "constexpr")
            for each in kernel.arg_names
        }
        source = ASTSource(kernel, signature, constants)
        made = triton.compile(
            source, target=GPUTarget(*TARGETS[target]), options={"num_warps": warps}
        )
        assert spilled(made, target, tmp_path) == 0, (name, constants)


def spilled(made: Any, target: str, folder: Path) -> int:
    """Return the bytes of registers that a kernel keeps in memory, by the tools that come with Triton."""
    if TARGETS[target][0] == "hip":
        return sum(map(int, re.findall(r"_spill_count:\s+(\d+)", made.asm["amdgcn"])))
    file = folder / "kernel.ptx"
    file.write_text(made.asm["ptx"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas-blackwell"
    kind = re.search(r"\.target (\w+)", made.asm["ptx"])
    assert kind
    done = subprocess.run(
        [tool, "-v", f"--gpu-name={kind[1]}", file, "-o", "/dev/null"],
        capture_output=True,
        text=True,
        check=True,
    )
    return sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr)))
