"""Time that each method needs to compute the factors, beside PEFT's own initialisation on the same weights.

Our time is that of the complete `initialise`: factors of all layers, exchange buffers and digest. PEFT's time is only
that inside `olora_init`, `pissa_init` and so on, so neither side counts the creation of wrapper modules.

- The first table is for OLoRA, with the error of both sides.
- The second table has one row per method: seconds, growth of the process's memory, and the largest relative difference
  of B0 A0 over the layers. Randomised methods are approximations, so each side is compared with the exact pissa.
- The third table has EVA, which reads training data. It runs on one batch; the time includes the forward pass, hooks
  and decompositions. The difference is the sine of the angle between the spaces of both A.

    python benchmarks/init.py [--repeats 5] [--peft-repeats 1] [--skip-model] [--methods pissa,nora]
"""

import argparse
import contextlib
import gc
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import MODEL, machine, model_folder, table
from init_from_data import from_data
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from olora_ray.adapter.initialise import initialise
from olora_ray.adapter.inject import Target, find_targets
from olora_ray.adapter.layer import Factors
from olora_ray.adapter.methods import from_weights
from olora_ray.common.logs import quiet_transformers

MATRICES = ((4096, 4096), (11008, 4096), (4096, 14336))
"""(out features, in features): square, the MLP of a 7B model, the transposed MLP of an 8B model."""

THEIRS: dict[str, tuple[Any, str]] = {
    "olora": ("olora", "olora_init"),
    "lora": (True, "reset_lora_parameters"),
    "pissa": ("pissa", "pissa_init"),
    "orthogonal": ("orthogonal", "orthogonal_init"),
}
"""Our method -> PEFT's init_lora_weights, and the function that computes it."""
RANK_FROM_DATA = 16
RANDOM = ("lora", "orthogonal")
"""Methods with random numbers, of which only time and memory can be compared."""
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
    parser.add_argument(
        "--repeats", type=int, default=5, help="repetitions of ours; the median counts"
    )
    parser.add_argument(
        "--peft-repeats",
        type=int,
        default=1,
        help="repetitions of PEFT, which takes seconds each time",
    )
    parser.add_argument("--skip-model", action="store_true", help="single matrices only")
    parser.add_argument("--methods", help="rows of the second table; default: all")
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
    rows = [compare(case, args.repeats, args.peft_repeats) for case in cases]
    print(
        table(
            (
                "weights, float32",
                "rank",
                "layers",
                "ours s",
                "PEFT s",
                "ratio",
                "difference",
                "our error",
                "PEFT's",
            ),
            rows,
        )
    )
    print("largest absolute difference of the factors, and of both to factors computed in float64")
    wanted = args.methods.split(",") if args.methods else from_weights()
    small = Case("one matrix, 1024 x 1024", 32, lambda: matrix(1024, 1024))
    print(f"\n{family(small if args.skip_model else cases[0], wanted)}")
    print("difference: largest of B0 A0, relative")
    name, make = (
        ("a Llama of 2 M", tiny_llama) if args.skip_model else (cases[0].name, cases[0].make)
    )
    print(f"\n{from_data(name, make, RANK_FROM_DATA, Watch)}")
    print("median and largest: sine of the angle between ours and PEFT's, over the layers")


def compare(case: Case, repeats: int, peft_repeats: int) -> tuple[str, ...]:
    ours: list[float] = []
    model = case.make()
    targets = find_targets(model, "all-linear", case.rank)
    for _ in range(1 + repeats):
        start = time.perf_counter()
        factors, _ = initialise(targets, "olora", case.rank, 0, torch.device("cpu"))
        ours.append(time.perf_counter() - start)
    theirs = []
    for _ in range(peft_repeats):
        seconds, found, _ = peft_factors(case, list(targets), "olora")
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


def gaps(
    targets: dict[str, Target], rank: int, ours: dict[str, Factors], theirs: Any
) -> tuple[float, float, float]:
    """Return the largest |ours - PEFT's|, |ours - exact| and |PEFT's - exact| over all factors."""
    largest = torch.zeros(3, dtype=torch.float64)
    for name, target in targets.items():
        weight = target.weight().double()
        b = torch.linalg.qr(weight[:, :rank]).Q
        triples = zip((ours[name].a0, ours[name].b0), theirs[name], (b.T @ weight, b), strict=True)
        for mine, other, exact in triples:
            pairs = ((mine, other), (mine, exact), (other, exact))
            largest = torch.maximum(
                largest, torch.stack([(x.double() - y.double()).abs().max() for x, y in pairs])
            )
    return tuple(largest.tolist())


def family(case: Case, methods: Sequence[str]) -> str:
    header = (
        case.name,
        "ours s",
        "PEFT s",
        "ratio",
        "ours MB",
        "PEFT MB",
        "difference",
        "PEFT's name",
    )
    return table(header, [of_method(case, method) for method in methods])


def of_method(case: Case, method: str) -> tuple[str, ...]:
    targets = find_targets(case.make(), "all-linear", case.rank)
    initialise(targets, method, case.rank, 0, torch.device("cpu"))  # warms up
    with Watch() as ours:
        factors, _ = initialise(targets, method, case.rank, 0, torch.device("cpu"))
    if method not in THEIRS:
        return (
            method,
            f"{ours.seconds:.3f}",
            "-",
            "-",
            f"{ours.megabytes:.0f}",
            "-",
            "-",
            "not there",
        )
    seconds, found, megabytes = peft_factors(case, list(targets), method)
    return (
        *(method, f"{ours.seconds:.3f}", f"{seconds:.2f}", f"{seconds / ours.seconds:.1f}"),
        *(f"{ours.megabytes:.0f}", f"{megabytes:.0f}", shown(method, factors, found)),
        str(THEIRS[method][0]),
    )


def shown(method: str, ours: dict[str, Factors], theirs: Pairs) -> str:
    if method in RANDOM:
        return "random"
    return f"{distance(pairs(ours), theirs):.1e}"


class Watch:
    """Seconds of a block, and growth of this process's resident memory in MB (Linux only; otherwise 0)."""

    def __enter__(self) -> "Watch":
        gc.collect()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
        self._before, self._began = resident("VmRSS"), time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self._began
        self.megabytes = max(0.0, resident("VmHWM") - self._before)


def resident(kind: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(kind)), 0.0)


def pairs(factors: dict[str, Factors]) -> Pairs:
    return {name: (item.a0, item.b0) for name, item in factors.items() if item.b0 is not None}


def distance(one: Pairs, other: Pairs) -> float:
    """Return the largest relative difference of B0 A0 over the layers; the scale is 1 on both sides."""
    found = []
    for name, (a, b) in other.items():
        product = b.double() @ a.double()
        mine_a, mine_b = one[name]
        found.append(float((mine_b.double() @ mine_a.double() - product).norm() / product.norm()))
    return max(found)


def peft_factors(case: Case, names: list[str], method: str) -> tuple[float, Pairs, float]:
    """Return seconds inside PEFT's initialisation, its factors (A, B) by layer, and its memory in MB."""
    model, spent = case.make(), 0.0
    init, function = THEIRS[method]
    original = getattr(LoraLayer, function)

    def timed(layer: LoraLayer, *arguments: Any) -> None:
        nonlocal spent
        start = time.perf_counter()
        original(layer, *arguments)
        spent += time.perf_counter() - start

    setattr(LoraLayer, function, timed)
    try:
        settings = LoraConfig(
            r=case.rank, lora_alpha=case.rank, target_modules=names, init_lora_weights=init
        )
        with Watch() as watch:
            get_peft_model(model, settings)
    finally:
        setattr(LoraLayer, function, original)
    layers = {name: model.get_submodule(name) for name in names}
    found = {
        name: (layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach())
        for name, layer in layers.items()
    }
    return spent, found, watch.megabytes


def matrix(m: int, n: int) -> nn.Module:
    model = nn.Sequential()
    model.add_module("proj", nn.Linear(n, m, bias=False, device="meta").to_empty(device="cpu"))
    model.proj.weight.data.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    return model


def tiny_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=2048, num_hidden_layers=4, **sizes)).eval()


def load(folder: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


if __name__ == "__main__":
    main()
