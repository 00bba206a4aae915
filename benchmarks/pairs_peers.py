"""Preference pairs beside TRL's DPOTrainer: first loss, margins, time and memory per pair, held-out pairs.

    pip install trl
    python benchmarks/pairs_peers.py [--seeds 4] [--attention "segments, prompt once"]

The model is SmolLM2-135M; the pairs are those of pipelines/recipes/short_answers, other ones for each seed. All
contestants get the same tokens in the same order, the same rate, precision, targets and rank. Each runs in a process
of its own, with one thread or OMP_NUM_THREADS. TRL is used as its documents say for PEFT: a model and a LoraConfig. Its
activation checkpointing is off, which makes it faster. `TRL, OLoRA, prepared` is a PeftModel made before the trainer:
TRL gives it a second adapter as its reference, for which PEFT takes OLoRA's factors out of the base once more.

Margins and changes of log p are in nats: means over held-out pairs, with the lowest and the highest of the seeds.
`told` is against the contestant's own reference, `true` against the base model.
CPU seconds of the training, per pair and step; `pass` is our measuring of the reference, once per data set. Memory is
the highest during the training above what the process had before it.

First, the gradients of plain LoRA, of an adapter that is past its start, are compared with plain autograd in float64.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import MODEL, MemoryStore, config, machine, model_folder, our_trainer, table
from contestants import RANK, Setting, timed
from learning_rate import ROOT, chat, store
from peers import arguments, gradients_of, timed_training
from throughput import distance

from olora_ray.tokens.plan import CHOSEN, REJECTED, Pack
from olora_ray.tokens.store import order
from olora_ray.train import reference

sys.path.append(str(ROOT / "pipelines"))
from recipes.short_answers.make_rows import row

PAIRS_A_STEP = 4
BETA = 0.1
Both = list[tuple[float, float]]
"""log p of the chosen and the rejected answer of each pair."""
CONTESTANTS = ("ours, OLoRA", "ours, LoRA", "TRL, LoRA", "TRL, OLoRA", "TRL, OLoRA, prepared")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1.0e-4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--attention", default="segments", help="layout of our batches")
    parser.add_argument("--storage", default="./runs", help="folder for the dequantised model")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        job = {**vars(args), "folder": model_folder(MODEL, args.storage), "scratch": scratch}
        print(machine())
        off = [f"{name}: {by:.1e}" for name, by in gradients(job).items()]
        print(f"gradient of LoRA, off by: {', '.join(off)}\n", flush=True)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
        for seed in range(args.seeds):
            base = run(job | {"name": "base", "seed": seed})["after"]
            for name in CONTESTANTS:
                found[name].append(judged(run(job | {"name": name, "seed": seed}), base))
                print(f"seed {seed}: {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    print(result(found))


def gradients(job: dict[str, Any]) -> dict[str, float]:
    found = {}
    first = f"{job['scratch']}/ours, LoRA.pt"
    for name in ("ours, LoRA", "TRL, LoRA", "exact, LoRA"):
        file = f"{job['scratch']}/{name}.pt"
        run(job | {"name": name, "seed": 0, "steps": 1, "gradient": file, "of": first})
        found[name] = torch.load(file)["gradient"]
    exact = found["exact, LoRA"]
    off = {f"{name} to float64": distance(found[name], exact) for name in [*found][:2]}
    return off | {"ours to TRL's": distance(found["ours, LoRA"], found["TRL, LoRA"])}


def run(job: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, json.dumps(job)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def judged(found: dict[str, Any], base: Both) -> dict[str, float]:
    """Return the numbers of a contestant, with what is true of its held-out pairs."""
    before, own, after = (np.array(found.pop(name)) for name in ("before", "reference", "after"))
    right = np.array(base)
    numbers: dict[str, float] = dict(found)
    for name, given in (("before", before), ("after", after)):
        numbers[f"{name}, told"] = float(margins(given - own).mean())
        numbers[f"{name}, true"] = float(margins(given - right).mean())
    numbers["start"] = float((before - right)[:, 0].mean())
    numbers["accuracy told"] = float((margins(after - own) > 0).mean())
    numbers["preferred"] = float((margins(after - right) > 0).mean())
    numbers["chosen"] = float((after - right)[:, 0].mean())
    return numbers


def margins(gains: Any) -> Any:
    return gains[:, 0] - gains[:, 1]


def result(found: dict[str, list[dict[str, float]]]) -> str:
    """Return the tables: medians of costs and first losses over the seeds, means of the rest with their range."""
    parts = []
    parts.append(["", "first loss", "CPU s per pair", "pass", "MB above the model"])
    for name, runs in found.items():
        first, cpu, before, memory = (
            median(run[key] for run in runs) for key in ("first loss", "cpu", "pass", "megabytes")
        )
        parts.append([name, f"{first:.7f}", f"{cpu:.2f}", f"{before:.2f}", f"{memory:.0f}"])
    costs = table(parts[0], parts[1:])
    shown = {
        "before, told": "margin before, told",
        "before, true": "true",
        "start": "log p chosen before",
        "after, told": "margin after, told",
        "after, true": "true",
        "accuracy told": "preferred, told",
        "preferred": "true",
        "chosen": "log p chosen after",
    }
    rows = []
    for name, runs in found.items():
        cells = [name]
        for key in shown:
            values = [run[key] for run in runs]
            cells.append(f"{fmean(values):.2f} ({min(values):.2f}, {max(values):.2f})")
        rows.append(cells)
    return f"{costs}\n\n{table(('', *shown.values()), rows)}"


# A contestant, in its own process.


def contestant(job: dict[str, Any]) -> dict[str, Any]:
    kind = job["name"].partition(",")[0]
    held_out = pairs_of(job, "heldout", job["held_out"])
    if kind == "base":
        return {"after": log_p(plain_model(job), held_out)}
    pairs = pairs_of(job, "train", job["steps"] * PAIRS_A_STEP)
    if kind == "ours":
        return ours(job, pairs, held_out)
    if kind == "exact":
        return exact(job, pairs)
    # TRL takes the pairs in the order of the list, ours in that of the seed.
    in_order = order(len(pairs), job["seed"], 0, len(pairs))
    return theirs(job, [pairs[int(index)] for index in in_order], held_out)


def pairs_of(job: dict[str, Any], split: str, count: int) -> list[Pack]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["folder"])
    rng = random.Random(f"{split} {job['seed']}")
    rows = [row(split, rng) for _ in range(count)]
    answers = [
        store(tokenizer, [chat(each["prompt"], each[name]) for each in rows])
        for name in ("chosen", "rejected")
    ]
    return [
        Pack(
            np.concatenate([chosen.input_ids, rejected.input_ids]),
            np.concatenate([chosen.supervised, rejected.supervised]),
            (*chosen.segments, *rejected.segments),
            (CHOSEN, REJECTED),
        )
        for chosen, rejected in zip(*answers, strict=True)
    ]


def answers_of(pair: Pack) -> list[tuple[list[int], list[int]]]:
    """Return prompt and answer of both answers."""
    parts = []
    border = pair.segments[0]
    for part in (slice(0, border), slice(border, None)):
        prompt = int(pair.supervised[part].argmax())
        ids = pair.input_ids[part].tolist()
        parts.append((ids[:prompt], ids[prompt:]))
    return parts


@torch.no_grad()
def log_p(model: Any, pairs: Sequence[Pack]) -> Both:
    sums = [tuple(float(each) for each in of_pair(model, pair)) for pair in pairs]
    return [(chosen, rejected) for chosen, rejected in sums]


def of_pair(model: Any, pair: Pack) -> list[torch.Tensor]:
    sums = []
    for prompt, answer in answers_of(pair):
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        of_answer = logits[len(prompt) - 1 : -1]
        sums.append(-F.cross_entropy(of_answer, torch.tensor(answer), reduction="sum"))
    return sums


def exact(job: dict[str, Any], pairs: list[Pack]) -> dict[str, Any]:
    """Write the gradient of the first step: plain autograd in float64, pair by pair."""
    from peft import get_peft_model

    model: Any = get_peft_model(plain_model(job).double(), lora("LoRA")).double()
    load(model, torch.load(job["of"])["weights"])
    for pair in pairs:
        with torch.no_grad(), model.disable_adapter():
            own = of_pair(model, pair)
        chosen, rejected = of_pair(model, pair)
        margin = (chosen - own[0]) - (rejected - own[1])
        (-F.logsigmoid(BETA * margin) / len(pairs)).backward()
    torch.save({"gradient": gradients_of(model)}, job["gradient"])
    return {}


def lora(method: str) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules="all-linear",
        init_lora_weights="olora" if method == "OLoRA" else True,
        task_type="CAUSAL_LM",
    )


def ours(job: dict[str, Any], pairs: list[Pack], held_out: list[Pack]) -> dict[str, Any]:
    from olora_ray.train.loader import Schedule, StepLoader

    train = {"objective": "pairs", "beta": BETA, "lr": job["lr"], "steps": job["steps"]}
    train |= {"global_batch": PAIRS_A_STEP, "micro_batch": PAIRS_A_STEP}
    adapter = {"method": job["name"].split(", ")[1].lower(), "rank": RANK, "alpha": RANK}
    cfg = config(
        job["scratch"],
        {"name": job["folder"], "dtype": job["dtype"]},
        train=train | {"schedule": "constant", "warmup": 0.0},
        adapter=adapter,
        cluster={"workers": 1},
    )
    cfg = cfg.model_copy(update={"run": cfg.run.model_copy(update={"seed": job["seed"]})})
    trainer, _ = our_trainer(cfg, job["folder"])
    attention = job["attention"]

    def measured(packs: list[Pack]) -> list[tuple[float, ...]]:
        return [*reference.measured(trainer, MemoryStore(packs), attention)]

    before = measured(held_out)
    losses: list[tuple[float, ...]] = []
    passed = timed(lambda: losses.extend(measured(pairs)))
    given = zip(pairs, losses, strict=True)
    known = MemoryStore([replace(pack, reference=both) for pack, both in given])
    if "gradient" in job:
        keep_gradient(trainer, job["gradient"])
    loader = StepLoader(known, cfg.train, job["seed"], attention)
    results: deque[Any] = deque()
    start = memory(begin=True)
    taken = timed(lambda: results.extend(trainer.steps(loader, 0, Schedule(cfg.train, known))))
    peak = memory() - start
    started, ended = (
        [tuple(-x for x in both) for both in each] for each in (before, measured(held_out))
    )
    return {
        "first loss": results[0].loss,
        "cpu": taken["cpu"] / len(pairs),
        "pass": passed["cpu"] / len(pairs),
        "megabytes": peak,
        "before": started,
        "reference": started,
        "after": ended,
    }


def keep_gradient(trainer: Any, file: str) -> None:
    """Move the adapter from its start, and write it and the gradient of the first step."""
    vector = trainer.flat.vector
    vector.copy_(0.01 * torch.randn(vector.shape, generator=torch.Generator().manual_seed(0)))
    weights = {name: layer.weights().plain_lora() for name, layer in trainer.adapted.items()}

    def keep(lr: float, norm: float | None = None) -> float:
        torch.save({"weights": weights, "gradient": trainer.flat.named(trainer.flat.grad)}, file)
        return 0.0

    trainer.optimizer.step = keep


def theirs(job: dict[str, Any], pairs: list[Pack], held_out: list[Pack]) -> dict[str, Any]:
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.utils import use_adapter

    class Given(DPOTrainer):
        """The trainer, which takes our tokens instead of its own."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
            torch.save({"gradient": gradients_of(model)}, job["gradient"])

    method, *prepared = job["name"].split(", ")[1:]
    how: Any = lora(method)
    torch.manual_seed(job["seed"])
    model = plain_model(job)
    if prepared:
        model = get_peft_model(model, how)
        how = None
    examples = []
    for pair in pairs:
        (prompt, chosen), (_, rejected) = answers_of(pair)
        examples.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    setting = Setting(job["name"], "trl", micro=PAIRS_A_STEP)
    told = arguments(setting, job, "gradient" in job, len(pairs)) | {
        "gradient_accumulation_steps": 1,
        "learning_rate": job["lr"],
        "beta": BETA,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "bf16": False,
    }
    trainer = Given(
        model,
        args=DPOConfig(**told),
        train_dataset=Dataset.from_list(examples),
        processing_class=AutoTokenizer.from_pretrained(job["folder"]),
        peft_config=how,
    )
    if "gradient" in job:
        trainer.add_callback(Keep())
        load(trainer.model, torch.load(job["of"])["weights"])
    adapted: Any = trainer.model
    adapted.eval()
    before = log_p(adapted, held_out)
    # As the trainer switches to its reference.
    with use_adapter(adapted, "ref" if "ref" in adapted.peft_config else None):
        own = log_p(adapted, held_out)
    start = memory(begin=True)
    taken = timed_training(trainer)
    peak = memory() - start
    adapted.eval()
    return {
        "first loss": trainer.state.log_history[0]["loss"],
        "cpu": taken["cpu"] / len(pairs),
        "pass": 0.0,
        "megabytes": peak,
        "before": before,
        "reference": own,
        "after": log_p(adapted, held_out),
    }


def load(model: Any, weights: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    for name, parameter in model.named_parameters():
        layer, _, which = name.removeprefix("base_model.model.").partition(".lora_")
        if which:
            parameter.data.copy_(weights[layer]["AB".index(which[0])])


def plain_model(job: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, job["dtype"])
    model = AutoModelForCausalLM.from_pretrained(
        job["folder"], dtype=dtype, attn_implementation="sdpa"
    )
    model.config.use_cache = False
    return model


def memory(begin: bool = False) -> float:
    """Return the megabytes that this process has at `begin`, else the most since then."""
    if begin:
        Path("/proc/self/clear_refs").write_text("5")
    name = "VmRSS" if begin else "VmHWM"
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"{name}:\s+(\d+)", status)[0]) / 1024


def begun() -> None:
    import datasets

    from olora_ray.common.logs import quiet_transformers

    warnings.filterwarnings("ignore")
    quiet_transformers()
    datasets.disable_progress_bars()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    print("\n" + json.dumps(contestant(json.loads(sys.argv[1]))), flush=True)


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("{"):
        begun()
    else:
        main()
