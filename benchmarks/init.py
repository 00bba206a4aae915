"""Time to the OLoRA factors, beside PEFT's `init_lora_weights="olora"` on the same weights in the same run.

Ours is the whole of `initialise`: factors of every layer, exchange buffers and digest. PEFT's is the
time inside its `olora_init` alone, so making the wrapper modules counts for neither.

    python benchmarks/init.py [--repeats 5] [--peft-repeats 1] [--skip-model]
"""

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from common import MODEL, machine, model_folder, table
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from olora_ray.adapter.factors import Factors
from olora_ray.adapter.initialise import initialise
from olora_ray.adapter.targets import Target, find_targets
from olora_ray.common.quiet import quiet_transformers

MATRICES = ((4096, 4096), (11008, 4096), (4096, 14336))
"""Out x in features: square, the MLP of a 7B model, the MLP of an 8B model on its side."""


@dataclass(frozen=True)
class Case:
    """A model and a rank; `make` gives the same weights each time (PEFT changes them)."""

    name: str
    rank: int
    make: Callable[[], Any]


def main() -> None:
    """Run all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="of ours; the median counts")
    parser.add_argument("--peft-repeats", type=int, default=1, help="of PEFT's, which take seconds each")
    parser.add_argument("--skip-model", action="store_true", help="single matrices only")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--storage", default="./runs", help="where a GGUF model is dequantised to")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    quiet_transformers()
    print(machine())
    cases = [Case(f"one matrix, {m} x {n}", 32, lambda m=m, n=n: matrix(m, n)) for m, n in MATRICES]
    if not args.skip_model:
        folder = model_folder(args.model, args.storage)
        cases.insert(0, Case("SmolLM2-135M, all-linear", 16, lambda: load(folder)))
    rows = [compare(case, args.repeats, args.peft_repeats) for case in cases]
    print(
        table(
            ("weights, float32", "rank", "layers", "ours s", "PEFT s", "ratio", "difference", "our error", "PEFT's"),
            rows,
        )
    )
    print("largest absolute difference of the factors, and of both to factors computed in float64")


def compare(case: Case, repeats: int, peft_repeats: int) -> tuple[str, ...]:
    """One row of the table."""
    ours: list[float] = []
    model = case.make()
    targets = find_targets(model, "all-linear", case.rank)
    for _ in range(1 + repeats):
        start = time.perf_counter()
        factors, _ = initialise(targets, "olora", case.rank, 0, torch.device("cpu"))
        ours.append(time.perf_counter() - start)
    theirs = []
    for _ in range(peft_repeats):
        seconds, found = peft_olora(case, list(targets))
        theirs.append(seconds)
    first, second = median(ours[1:]), median(theirs)  # our first call warms up
    return (
        case.name,
        str(case.rank),
        str(len(targets)),
        f"{first:.3f}",
        f"{second:.2f}",
        f"{second / first:.0f}",
        *(f"{gap:.1e}" for gap in gaps(targets, case.rank, factors, found)),
    )


def gaps(targets: dict[str, Target], rank: int, ours: dict[str, Factors], theirs: Any) -> tuple[float, float, float]:
    """Largest |ours - PEFT's|, |ours - exact| and |PEFT's - exact| over all factors."""
    largest = torch.zeros(3, dtype=torch.float64)
    for name, target in targets.items():
        weight = target.weight().double()
        b = torch.linalg.qr(weight[:, :rank]).Q
        triples = zip((ours[name].a0, ours[name].b0), theirs[name], (b.T @ weight, b), strict=True)
        for mine, other, exact in triples:
            pairs = ((mine, other), (mine, exact), (other, exact))
            largest = torch.maximum(largest, torch.stack([(x.double() - y.double()).abs().max() for x, y in pairs]))
    return tuple(largest.tolist())


def peft_olora(case: Case, names: list[str]) -> tuple[float, dict[str, tuple[Tensor, Tensor]]]:
    """Seconds inside PEFT's olora_init, and its factors (A, B) by layer."""
    model, spent = case.make(), 0.0
    original = LoraLayer.olora_init

    def timed(layer: LoraLayer, adapter: str) -> None:
        nonlocal spent
        start = time.perf_counter()
        original(layer, adapter)
        spent += time.perf_counter() - start

    LoraLayer.olora_init = timed
    try:
        settings = LoraConfig(r=case.rank, lora_alpha=case.rank, target_modules=names, init_lora_weights="olora")
        get_peft_model(model, settings)
    finally:
        LoraLayer.olora_init = original
    layers = {name: model.get_submodule(name) for name in names}
    return spent, {
        name: (layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach())
        for name, layer in layers.items()
    }


def matrix(m: int, n: int) -> nn.Module:
    """A model of one random linear layer."""
    model = nn.Sequential()
    model.add_module("proj", nn.Linear(n, m, bias=False, device="meta").to_empty(device="cpu"))
    model.proj.weight.data.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    return model


def load(folder: str) -> nn.Module:
    """The language model in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


if __name__ == "__main__":
    main()
