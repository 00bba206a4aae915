"""adapt() beside PEFT's OLoRA in the same bare loop: time to adapt the model, and of a step with AdamW, on the CPU.

    python benchmarks/adapt.py [--repeats 5]

Each number is the median of the repeats.
"""

import argparse
import time
from statistics import median
from typing import Any

import torch
from common import MODEL, machine, model_folder, table
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from olora_ray.adapter import adapt

RANK = 16
IDS = torch.randint(3, 40_000, (2, 512), generator=torch.Generator().manual_seed(0))


def ours(model: Any) -> Any:
    return model, adapt(model, rank=RANK).optimizer("adamw", lr=1e-4)


def theirs(model: Any) -> Any:
    lora = LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights="olora")
    model = get_peft_model(model, lora)
    trained = [part for part in model.parameters() if part.requires_grad]
    return model, torch.optim.AdamW(trained, lr=1e-4)


def seconds(folder: str, start: Any) -> tuple[float, float]:
    """Return the seconds to adapt the model, and the median of three steps after one to warm up."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    began = time.perf_counter()
    model, optimizer = start(base)
    adapted = time.perf_counter() - began
    steps = []
    for _ in range(4):
        began = time.perf_counter()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(time.perf_counter() - began)
    return adapted, median(steps[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="in turn; the medians count")
    parser.add_argument("--storage", default="./runs", help="folder for the dequantised model")
    args = parser.parse_args()
    print(machine())
    folder = model_folder(MODEL, args.storage)
    pairs = [(seconds(folder, ours), seconds(folder, theirs)) for _ in range(args.repeats)]
    rows = []
    for part, name in enumerate(("adapt the model", "step of 1,024 tokens")):
        mine = median(pair[0][part] for pair in pairs)
        peer = median(pair[1][part] for pair in pairs)
        ratio = median(pair[0][part] / pair[1][part] for pair in pairs)
        rows.append((name, f"{mine:.2f}", f"{peer:.2f}", f"{ratio:.2f}"))
    print(table(("median", "ours s", "PEFT s", "ours / PEFT"), rows))


if __name__ == "__main__":
    main()
