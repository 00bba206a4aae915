"""A quantised base model beside the original one, and beside PEFT's QLoRA: memory, and loss on the same rows.

Each contestant trains an adapter on the same sequences, in its own process, with AdamW and a constant learning rate.
"base" is the size of the base model's weights and buffers. "peak" is the peak of the process's resident memory after
its imports; freed memory is returned at once. The losses are that of the first step, and the mean of the last five.
All compute in float32. "start" is exact if the first loss equals, to the bit, that of the quantised base model
without an adapter. QLoRA is PEFT's LoRA on a base model that transformers loads with bitsandbytes' nf4. Target: after
the same steps a loss within 1 % of QLoRA's with the same method (lora), in no more memory.

    python benchmarks/quantised.py [--tiny] [--steps 60] [--only NAME]
"""

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import MODEL, config, machine, memory_store, met, model_folder, our_trainer, table
from memory import MIB, make_model, resident

CORPUS = Path(__file__).resolve().parent.parent / "pipelines" / "quickstart" / "train.jsonl"
CONTESTANTS: dict[str, tuple[str, str]] = {
    "ours, olora, no quantisation": ("none", "olora"),
    "ours, olora, int8": ("int8", "olora"),
    "ours, olora, fp8": ("fp8", "olora"),
    "ours, olora, nf4": ("nf4", "olora"),
    "ours, lora, nf4": ("nf4", "lora"),
    "PEFT's QLoRA, nf4": ("nf4", "peft"),
}
"""Name -> (quantisation, method or library)."""
RANK, LENGTH, BATCH, RATE = 8, 256, 4, 3.0e-4
OURS, QLORA, MOST_OFF = "ours, lora, nf4", "PEFT's QLoRA, nf4", 0.01
"""The two contestants to compare, and the largest excess of our loss."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a small random model, to test the script"
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument(
        "--only",
        choices=list(CONTESTANTS),
        action="append",
        help="contestant to run; may be repeated",
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(trained(**json.loads(args.child))))
        return
    print(machine())
    rows, results = [], dict[str, dict[str, float]]()
    with tempfile.TemporaryDirectory() as scratch:
        if args.tiny:
            folder = str(Path(scratch) / "model")
            make_model("llama", 8192, True, folder)
        else:
            folder = model_folder(MODEL, scratch)
        for name, (kind, method) in CONTESTANTS.items():
            if args.only and name not in args.only:
                continue
            job = {
                "folder": folder,
                "kind": kind,
                "method": method,
                "steps": args.steps,
                "text": not args.tiny,
            }
            if (found := apart(job)) is None:
                rows.append((name, "failed", *5 * ("-",)))
                continue
            results[name] = found
            rows.append(row(name, found))
            print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    print(
        table(
            ("contestant", "base MiB", "peak MiB", "start", "first loss", "last loss", "s a step"),
            rows,
        )
    )
    print(verdict(results))
    if len(results) < len(rows):
        raise SystemExit(1)


def row(name: str, found: dict[str, float]) -> tuple[str, ...]:
    off = found["first"] - found["without"]
    return (
        name,
        f"{found['base'] / MIB:.1f}",
        f"{found['peak'] / MIB:.0f}",
        "exact" if off == 0 else f"{off:+.1e}",
        f"{found['first']:.4f}",
        f"{found['last']:.4f}",
        f"{found['seconds']:.2f}",
    )


def verdict(results: dict[str, dict[str, float]]) -> str:
    if not {OURS, QLORA} <= results.keys():
        return f"{OURS} beside {QLORA}: not measured"
    ours, theirs = results[OURS], results[QLORA]
    off, memory = ours["last"] / theirs["last"] - 1, ours["peak"] / theirs["peak"]
    return (
        f"{OURS}, compared with {QLORA}: last loss {off:+.2%} (target at most {MOST_OFF:+.0%}: {met(off <= MOST_OFF)}),"
        f" {memory:.2f} times its memory (target at most 1: {met(memory <= 1)})"
    )


def apart(job: dict[str, Any]) -> dict[str, float] | None:
    """Return the result of `trained` in a new process, or None if it fails."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(job)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return None
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def trained(folder: str, kind: str, method: str, steps: int, text: bool) -> dict[str, float]:
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: larger blocks go back to the system
    batches = batches_of(folder, steps, text)
    warm_up(folder)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    step, bare, base = of_peft(folder) if method == "peft" else of_ours(folder, kind, method)
    without = bare(batches[0])
    began, losses = time.perf_counter(), [step(number, rows) for number, rows in enumerate(batches)]
    taken = time.perf_counter() - began
    last = losses[-5:]
    return {
        "base": base,
        "peak": resident("VmHWM") - before,
        "without": without,
        "first": losses[0],
        "last": sum(last) / len(last),
        "seconds": taken / len(losses),
    }


def warm_up(folder: str) -> None:
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch

    from olora_ray.model.load import empty_model

    settings = config("unused", {"name": folder, "dtype": "float32"})
    empty_model(folder, settings.model, torch.device("cpu"))


def batches_of(folder: str, steps: int, text: bool) -> list[Any]:
    import numpy as np

    if text:
        from transformers import AutoTokenizer

        ids = AutoTokenizer.from_pretrained(folder)(CORPUS.read_text(), verbose=False)["input_ids"]
    else:
        ids = [byte + 2 for byte in CORPUS.read_bytes()]
    size = BATCH * LENGTH
    ids = np.resize(np.array(ids, dtype=np.int32), steps * size)
    return list(ids.reshape(steps, BATCH, LENGTH))


def of_ours(folder: str, kind: str, method: str) -> tuple[Any, Any, int]:
    """Return (step function: number and rows -> loss, the same for the base model alone, bytes of the base model)."""
    import numpy as np
    import torch

    from olora_ray.adapter.layer import AdaptedLinear
    from olora_ray.cluster import malloc
    from olora_ray.tokens.collate import collate
    from olora_ray.train import self_test
    from olora_ray.train.loop import train_mode

    malloc.keep_freed_memory = lambda *_: (
        None
    )  # freed memory must leave the process, or the peak would contain it
    settings = config(
        "unused",
        {"name": folder, "dtype": "float32", "quantization": kind},
        adapter={"method": method, "rank": RANK, "alpha": RANK},
        train={"micro_batch": BATCH, "global_batch": BATCH, "lr": RATE, "weight_decay": 0.0},
    )
    trainer, attention = our_trainer(settings, folder)
    own = {
        id(part)
        for layer in trainer.adapted.values()
        for part in (layer.da, layer.db, layer.a0, layer.b0)
    }
    assert all(isinstance(layer, AdaptedLinear) for layer in trainer.adapted.values())
    train_mode(trainer.adapted, True)

    def mean_loss(rows: Any) -> Any:
        store = memory_store([(row, np.arange(LENGTH) > 0) for row in rows], LENGTH)
        batch = collate(list(store), attention)
        return trainer.loss(batch) / len(batch.labels)

    def bare(rows: Any) -> float:
        with torch.no_grad(), self_test.bare(trainer.loss.model):
            return float(mean_loss(rows))

    def step(_: int, rows: Any) -> float:
        loss = mean_loss(rows)
        loss.backward()
        trainer.optimizer.step(RATE)
        trainer.flat.grad.zero_()
        train_mode(trainer.adapted, True)  # dA and dB have moved
        return float(loss.detach())

    return step, bare, held(trainer.loss.model, own)


def of_peft(folder: str) -> tuple[Any, Any, int]:
    """Return the same as `of_ours` for PEFT's QLoRA."""
    import torch
    import torch.nn.functional as F
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.manual_seed(0)
    packed = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=packed,
        device_map={"": "cpu"},
        attn_implementation="sdpa",
    )
    model.config.use_cache = False
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))
    model.train()
    trained_ones = [part for part in model.parameters() if part.requires_grad]
    optimizer = torch.optim.AdamW(trained_ones, lr=RATE, weight_decay=0.0)

    def mean_loss(rows: Any) -> Any:
        ids = torch.from_numpy(rows).long()
        logits = model(input_ids=ids).logits[:, :-1]
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    def bare(rows: Any) -> float:
        with torch.no_grad(), model.disable_adapter():
            return float(mean_loss(rows))

    def step(_: int, rows: Any) -> float:
        loss = mean_loss(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained_ones, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step, bare, held(model, {id(part) for part in trained_ones})


def held(model: Any, without: set[int]) -> int:
    """Return bytes of weights and buffers, and of bitsandbytes' records, without an adapter's own."""
    found = {
        id(part): part
        for part in (*model.parameters(), *model.buffers())
        if id(part) not in without
    }
    beside = [
        state.absmax
        for part in model.parameters()
        if (state := getattr(part, "quant_state", None)) is not None
    ]
    return sum(part.nbytes for part in (*found.values(), *beside))


if __name__ == "__main__":
    main()
