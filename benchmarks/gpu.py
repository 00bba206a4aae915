"""The GPU kit: checks, initialisation, speed and memory on one GPU, beside PEFT with transformers' Trainer.

It needs torch, transformers, peft, pydantic and pyarrow, but no network, no Ray and no MLflow; the project need not
be installed. The checks use a small random Llama in float32 and bfloat16: the start equals the base model to the bit,
packed examples have the same gradient as single ones, the gradient equals PEFT's, and the self-test gives a verdict
on each attention kernel. The measurements use random weights of Llama 3's shape: the factors beside PEFT's (on one
block, because PEFT's QR uses the complete matrix), and a pass over packed chats of random tokens with rank 16 on all
linear layers. PEFT gets several batch sizes, with and without recomputed activations; its best one counts. The share
of the peak counts only necessary work (benchmarks/multiplications.py), the same for both. On a GPU each measurement
has its own process.

    python benchmarks/gpu.py [--json gpu.json] [--size 8b] [--parts checks,init,training] [--lengths 4096,8192]
    python benchmarks/gpu.py --size tiny --device cpu        all of it on a CPU, to see that it runs
"""

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # the project need not be installed
if missing := [n for n in ("torch", "transformers", "peft", "accelerate", "pydantic", "pyarrow") if not find_spec(n)]:
    raise SystemExit(f"not installed: {', '.join(missing)}; install them (without a network, from wheels)")

import torch  # noqa: E402
from common import machine, table  # noqa: E402
from gpu_checks import checks  # noqa: E402
from gpu_models import SIZES, facts  # noqa: E402
from gpu_training import initialisation, ours, peft  # noqa: E402

from olora_ray.common.logs import quiet_transformers  # noqa: E402

PARTS = ("checks", "init", "training")
TARGETS = {"share of the peak": 0.45, "times PEFT": 1.5, "tokens a second": 12_500.0}
"""Targets for size 8b on one H100."""
WORK = {
    "card": facts,
    "checks": lambda job: checks(torch.device(job["device"])),
    "init": initialisation,
    "ours": ours,
    "peft": peft,
}
Found = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    args = arguments(argv)
    warnings.filterwarnings("ignore")
    quiet_transformers()
    if args.job:
        print("\n" + json.dumps(WORK[json.loads(args.job)["kind"]](json.loads(args.job))), flush=True)
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU; --size tiny --device cpu tests the kit on a CPU")
    found: Found = {"machine": machine(), "size": args.size, "dtype": args.dtype, "card": run(_job("card", args))}
    for part in ("card", *args.parts):
        print(f"{SHOWN[part](measured(part, found, args))}\n", flush=True)
        if args.json:  # what has been measured is kept when something later fails
            args.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if all_passed(found) else 1


def measured(part: str, found: Found, args: argparse.Namespace) -> Any:
    if part == "training":
        lengths = args.lengths or SIZES[args.size].lengths
        found[part] = [contest(args, length, found["card"].get("peak")) for length in lengths]
    elif part not in found:
        found[part] = run(_job(part, args))
    return found[part]


def all_passed(found: Found) -> bool:
    checks = found.get("checks", {})
    return "failed" not in checks and all(check["ok"] for check in checks.values())


def contest(args: argparse.Namespace, length: int, top: float | None) -> Found:
    """Return the passes of both sides at one length, with their shares of the peak."""
    size = SIZES[args.size]
    batches = [max(1, size.micro_tokens // length)]
    while batches[-1] > 1:
        batches.append(batches[-1] // 2)
    mine: list[Found] = []
    for recompute, batch in product((False, True), batches):  # the largest that fits, the faster way first
        mine.append(_tried(_job("ours", args, length=length, batch=batch, recompute=recompute)))
        if "tokens a second" in mine[-1]:
            break
    theirs = [
        _tried(_job("peft", args, length=length, batch=batch, recompute=recompute)) for batch, recompute in size.peft
    ]
    work = mine[-1].get("operations a token")
    for each in (*mine, *theirs):
        if work and top and "tokens a second" in each:
            each["share of the peak"] = each["tokens a second"] * work / top
    return {"length": length, "ours": mine, "peft": theirs}


def run(job: Found) -> Found:
    """Run a job; on a GPU in a new process, so that it starts with empty memory and may crash."""
    if job["device"] == "cpu":
        return WORK[job["kind"]](job)
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    # Otherwise transformers' Trainer would split its batches over all visible GPUs.
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": first}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        return {"failed": last[0][:300] if last else f"exit code {done.returncode}"}
    found: Found = json.loads(done.stdout.splitlines()[-1])
    return found


def _tried(job: Found) -> Found:
    print(f"{job['kind']}, {job['length']} tokens, batch {job['batch']} ...", file=sys.stderr, flush=True)
    return {"batch": job["batch"], "recomputed": job["recompute"], **run(job)}


def _job(kind: str, args: argparse.Namespace, **others: Any) -> Found:
    own = {"kind": kind, "device": args.device, "size": args.size, "dtype": args.dtype, "rank": args.rank}
    return {**own, "step_tokens": SIZES[args.size].step_tokens, **others}


def card_line(found: Found) -> str:
    if "failed" in found:
        return f"{machine()}\nthe card: {found['failed']}"
    return (
        f"{machine()}\n{found['name']}: peak {found['peak'] / 1e12:.1f} TFLOP/s ({found['source']}), torch.matmul"
        f" {found['torch.matmul'] / 1e12:.1f}"
    )


def checks_table(found: Found) -> str:
    if "failed" in found:
        return f"the checks did not run: {found['failed']}"
    return table(("check", "result"), [(name, shown(each)) for name, each in found.items()])


def shown(check: Found) -> str:
    if "refused" in check:
        return f"refused: {check['refused'].partition(': ')[2][:70]}"
    told = check.get("failed") or (f"off by {check['difference']:.1e}" if "difference" in check else "")
    return f"{'ok' if check['ok'] else 'FAILED'} {told} {check.get('attention', '')}".rstrip()


def init_line(found: Found) -> str:
    if "failed" in found:
        return f"initialisation: {found['failed']}"
    return (
        f"initialisation: {found['layers']} layers in {found['ours']:.2f} s; the {found['layers of a block']} of a"
        f" block in {found['ours, a block']:.3f} s, with PEFT in {found['PEFT, a block']:.2f} s:"
        f" {found['ratio']:.0f} times; largest difference of the factors {found['difference']:.1e}"
    )


def training_table(contests: Sequence[Found]) -> str:
    rows = []
    for contest in contests:
        for name in ("ours", "peft"):
            for each in contest[name]:
                how = f", batch {each['batch']}{', recomputed' if each['recomputed'] else ''}"
                title = f"{contest['length']}: {'ours' if name == 'ours' else 'PEFT + Trainer'}{how}"
                rows.append((title, *_cells(each)))
    lines = table(("length", "tokens/s", "share of the peak", "GiB", "attention"), rows)
    return "\n".join((lines, *map(verdict, contests)))


def _cells(found: Found) -> tuple[str, str, str, str]:
    if "failed" in found:
        out = "OutOfMemory" in found["failed"]
        return "-", "-", "-", "out of memory" if out else found["failed"][:60]
    share = f"{found['share of the peak']:.1%}" if "share of the peak" in found else "-"
    return f"{found['tokens a second']:.0f}", share, f"{found['GiB']:.1f}", found["attention"]


def verdict(contest: Found) -> str:
    mine, theirs = (best(contest[name]) for name in ("ours", "peft"))
    if mine is None or theirs is None:
        return f"{contest['length']} tokens: no pass of {'ours' if mine is None else 'PEFT'} has ended"
    times = mine["tokens a second"] / theirs["tokens a second"]
    return (
        f"{contest['length']} tokens: {times:.2f} times PEFT's best speed, {mine['GiB'] / theirs['GiB']:.2f} times its"
        f" memory; {against_targets({**mine, 'times PEFT': times})}"
    )


def against_targets(found: Found) -> str:
    told = [
        f"{name} {found[name]:,.2f} ({TARGETS[name]:,.2f}: {'met' if found[name] >= TARGETS[name] else 'missed'})"
        for name in TARGETS
        if name in found
    ]
    return f"targets of 8b on one H100: {', '.join(told)}"


def best(passes: Sequence[Found]) -> Found | None:
    return max((each for each in passes if "tokens a second" in each), key=lambda e: e["tokens a second"], default=None)


SHOWN = {"card": card_line, "checks": checks_table, "init": init_line, "training": training_table}
"""Part -> function that prints its results."""


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="8b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lengths", type=_numbers, help="lengths of packed sequences, in tokens")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"--parts: {unknown[0]}: not one of {', '.join(PARTS)}")
    return args


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
