"""The day of several GPUs: one command of about ten minutes on a machine with two or more. It has not run on a GPU.

    python benchmarks/gpus.py                          all GPUs of this machine
    python benchmarks/gpus.py --device cpu --workers 2 on CPUs, to see that it runs

It measures the exchange of a step's gradients (the tree beside NCCL's all_reduce), and runs the quickstart through Ray:
with ddp, with a sharded base, and with a worker that is killed. Each result is a line of JSON in --out. Ray and MLflow
must be installed.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # the project need not be installed

from common import machine  # noqa: E402
from gpu_product import Found, Run  # noqa: E402
from multiplications import wait  # noqa: E402

from olora_ray.common import collectives  # noqa: E402
from olora_ray.train.tree import TreeSum  # noqa: E402

NUMBERS = {"135M": 4_884_480, "8B": 41_943_040}
"""Model -> trainable numbers at rank 16."""
STEPS = 6
SAME = 0.01
"""Largest relative difference of two final losses that rounding explains."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpus.jsonl"), help="(gpus.jsonl)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--workers", type=int, default=0, help="all GPUs by default")
    parser.add_argument("--only", choices=tuple(PARTS), action="append", help="(all)")
    args = parser.parse_args(argv)
    workers = args.workers or torch.cuda.device_count()
    if workers < 2:
        raise SystemExit("fewer than two GPUs; --device cpu --workers 2 tries the kit on CPUs")
    job = {"device": args.device, "workers": workers}
    print(f"{machine()}; {workers} x {args.device}")
    right = True
    for part in args.only or PARTS:
        for name, found in PARTS[part](job).items():
            line = {"part": part, "name": name, "job": job, **found}
            with args.out.open("a") as file:  # at once: a later part may fail
                file.write(json.dumps(line) + "\n")
            right = right and found["ok"]
            print(f"{name}: {json.dumps(found)}", flush=True)
    return 0 if right else 1


def exchange(job: Found) -> dict[str, Found]:
    """Measure the sum of a gradient over all workers: our tree, whose bits do not depend on them, and all_reduce."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_exchange, (folder, job), nprocs=job["workers"])  # type: ignore[no-untyped-call]
        found: dict[str, Found] = json.loads((Path(folder) / "found").read_text())
    return found


def _exchange(rank: int, folder: str, job: Found) -> None:
    device = torch.device(job["device"], rank if job["device"] == "cuda" else 0)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    workers = job["workers"]
    backend = "nccl" if device.type == "cuda" else "gloo"
    meeting = f"file://{folder}/meeting"
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=workers)
    found = {}
    for name, count in NUMBERS.items():
        own = torch.full((count,), rank + 1.0, device=device)
        tree = TreeSum(own.clone())

        def by_tree(tree: TreeSum = tree, own: torch.Tensor = own) -> None:
            tree.begin(workers)
            with tree.leaf(rank):
                tree.whole.copy_(own)
            tree.finish()

        reduced = own.clone()
        seconds = {
            "tree": _fastest(by_tree, device),
            "all_reduce": _fastest(lambda reduced=reduced: dist.all_reduce(reduced), device),
        }
        expected = workers * (workers + 1) / 2
        ok = bool((tree.whole == expected).all())
        found[f"exchange, {name}"] = {"ok": ok, "MB": 4 * count / 1e6, **seconds}
    if rank == 0:
        (Path(folder) / "found").write_text(json.dumps(found))
    collectives.wait_for_all()
    dist.destroy_process_group()


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    run()
    seconds = []
    for _ in range(5):
        wait(device)
        dist.barrier()
        began = time.perf_counter()
        run()
        wait(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def product(job: Found) -> dict[str, Found]:
    """Run the quickstart with ddp, with a sharded base, and with a worker that is killed after step 3."""
    settings = (
        f"train.steps={STEPS}",
        f"train.deterministic={str(job['device'] == 'cuda').lower()}",
    )
    found = {}
    with tempfile.TemporaryDirectory() as storage:
        whole = Run(storage, job, *settings)
        found["ddp"] = whole.check()
        if not found["ddp"]["ok"]:
            return found
        expected, loss = whole.adapter(), _loss(whole)
    with tempfile.TemporaryDirectory() as storage:
        sharded = Run(storage, job, *settings, "cluster.strategy=fsdp")
        check = sharded.check()
        if check["ok"]:
            check["difference"] = abs(_loss(sharded) / loss - 1)
            check["ok"] = check["difference"] < SAME
        found["fsdp"] = check
    with tempfile.TemporaryDirectory() as storage:
        disturbed = Run(storage, job, *settings, kill_after=3)
        check = disturbed.check()
        check["killed"] = disturbed.killed
        if check["ok"]:
            check["same bytes"] = disturbed.adapter() == expected
            check["ok"] = disturbed.killed and check["same bytes"]
        found["a worker is killed"] = check
    return found


def _loss(run: Run) -> float:
    """Return the held-out loss after the last step."""
    result = json.loads((run.folder / "result.json").read_text())
    return float(result["metrics"]["eval/loss"])


PARTS = {"exchange": exchange, "product": product}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
