"""Time to compute OLoRA's factors, beside PEFT's own initialisation on the same weights.

Our time is that of the complete `initialise`: factors of all layers, exchange buffers and digest. PEFT's time is only
that inside `olora_init`, so neither side counts the creation of wrapper modules. Both sides are compared with factors
that are computed in float64.

    python benchmarks/init.py [--repeats 5] [--peft-repeats 1] [--skip-model]
"""

import argparse
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from common import MODEL, machine, model_folder, table
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from olora_ray.adapter.initialise import initialise
from olora_ray.adapter.inject import Target, find_targets
from olora_ray.adapter.layer import Factors
from olora_ray.common.logs import quiet_transformers

MATRICES = ((4096, 4096), (11008, 4096), (4096, 14336))
"""(out features, in features): square, the MLP of a 7B model, the transposed MLP of an 8B model."""
HEADER = (
    *("weights, float32", "rank", "layers", "ours s", "PEFT s"),
    *("ratio", "difference", "our error", "PEFT's"),
)
Pairs = dict[str, tuple[Tensor, Tensor]]
"""(A, B) by layer."""


@dataclass(frozen=True)
class Case:
    """A model and a rank; `make` returns the same weights each time, because PEFT changes them."""

    name: str
    rank: int
    make: Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="of ours; the median counts")
    parser.add_argument("--peft-repeats", type=int, default=1, help="PEFT takes seconds each time")
    parser.add_argument("--skip-model", action="store_true", help="single matrices only")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--storage", default="./runs", help="folder for the dequantised model")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    quiet_transformers()
    print(machine())
    cases = [Case(f"one matrix, {m} x {n}", 32, lambda m=m, n=n: matrix(m, n)) for m, n in MATRICES]
    if not args.skip_model:
        folder = model_folder(args.model, args.storage)
        cases.insert(0, Case("SmolLM2-135M, all-linear", 16, lambda: load(folder)))
    print(table(HEADER, [compare(case, args.repeats, args.peft_repeats) for case in cases]))
    print("largest absolute difference of the factors, and of both to factors computed in float64")


def compare(case: Case, repeats: int, peft_repeats: int) -> tuple[str, ...]:
    ours: list[float] = []
    targets = find_targets(case.make(), "all-linear", case.rank)
    for _ in range(1 + repeats):
        start = time.perf_counter()
        factors, _ = initialise(targets, "olora", case.rank, 0, torch.device("cpu"))
        ours.append(time.perf_counter() - start)
    theirs = []
    for _ in range(peft_repeats):
        seconds, found = peft_factors(case, list(targets))
        theirs.append(seconds)
    first = median(ours[1:])  # our first call warms up
    second = median(theirs)
    return (
        case.name,
        str(case.rank),
        str(len(targets)),
        f"{first:.3f}",
        f"{second:.2f}",
        f"{second / first:.0f}",
        *(f"{gap:.1e}" for gap in gaps(targets, case.rank, factors, found)),
    )


def gaps(
    targets: Mapping[str, Target], rank: int, ours: Mapping[str, Factors], theirs: Pairs
) -> list[float]:
    """Return the largest |ours - PEFT's|, |ours - exact| and |PEFT's - exact| over all factors."""
    largest = torch.zeros(3, dtype=torch.float64)
    for name, target in targets.items():
        weight = target.weight().double()
        b = torch.linalg.qr(weight[:, :rank]).Q
        triples = zip((ours[name].a0, ours[name].b0), theirs[name], (b.T @ weight, b), strict=True)
        for mine, other, exact in triples:
            pairs = ((mine, other), (mine, exact), (other, exact))
            found = [(x.double() - y.double()).abs().max() for x, y in pairs]
            largest = torch.maximum(largest, torch.stack(found))
    return largest.tolist()


def peft_factors(case: Case, names: list[str]) -> tuple[float, Pairs]:
    """Return the seconds inside PEFT's initialisation, and its factors by layer."""
    model = case.make()
    spent = 0.0
    original = LoraLayer.olora_init

    def timed(layer: LoraLayer, *arguments: Any) -> None:
        nonlocal spent
        start = time.perf_counter()
        original(layer, *arguments)
        spent += time.perf_counter() - start

    LoraLayer.olora_init = timed
    try:
        settings = LoraConfig(
            r=case.rank, lora_alpha=case.rank, target_modules=names, init_lora_weights="olora"
        )
        get_peft_model(model, settings)
    finally:
        LoraLayer.olora_init = original
    found = {}
    for name in names:
        layer = model.get_submodule(name)
        a = layer.lora_A["default"].weight.detach()
        found[name] = (a, layer.lora_B["default"].weight.detach())
    return spent, found


def matrix(m: int, n: int) -> nn.Module:
    model = nn.Sequential()
    model.add_module("proj", nn.Linear(n, m, bias=False, device="meta").to_empty(device="cpu"))
    model.proj.weight.data.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    return model


def load(folder: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


if __name__ == "__main__":
    main()
