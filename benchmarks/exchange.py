"""The exchange of gradients between two machines: bytes and seconds, summed inside each machine first, and flat.

The machines are network namespaces, joined by a link of a limited rate, with processes that talk by gloo, without Ray.
Each process runs train/tree.py's sum of a vector. In the flat order each process has a host name of its own, and so
counts as a machine. The bytes are those that the link's counter shows for one machine, headers of packets included. The
seconds are the median of the rounds, of the slowest process. The sums must have the same bits. Needs root.

    python benchmarks/exchange.py [--workers 8] [--megabytes 8] [--megabits 200] [--rounds 5]
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from common import machine, table  # noqa: E402

from olora_ray.common import collectives  # noqa: E402
from olora_ray.train.tree import TreeSum  # noqa: E402

NETWORK = "10.79.0"
SENT = Path("/sys/class/net/eth0/statistics/tx_bytes")
ORDERS = {"inside each machine first": False, "flat": True}


def main(argv: Sequence[str]) -> int:
    arguments = parsed(argv)
    if arguments.job:
        print(json.dumps(worker(json.loads(arguments.job))))
        return 0
    if problem := missing():
        print(f"not measured: {problem}")
        return 0
    with machines(arguments.megabits) as names:
        found = {order: run(arguments, names, flat) for order, flat in ORDERS.items()}
    print(machine())
    size = arguments.megabytes * 1e6
    rows = [
        (order, f"{each['sent'] / 1e6:.1f}", f"{each['sent'] / size:.2f}", f"{each['seconds']:.2f}")
        for order, each in found.items()
    ]
    print(
        f"2 machines x {arguments.workers} workers, {arguments.megabytes:g} MB, {arguments.megabits:g} Mbit/s"
    )
    print(table(("order", "MB per machine and step", "vectors", "seconds"), rows))
    same = len({digest for each in found.values() for digest in each["digests"]}) == 1
    print(f"target: all sums have the same bits: {'met' if same else 'missed'}")
    return 0 if same else 1


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=8, help="per machine (8)")
    parser.add_argument("--megabytes", type=float, default=8.0, help="of the vector (8)")
    parser.add_argument(
        "--megabits", type=float, default=200.0, help="per second and direction (200)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def missing() -> str | None:
    """Return why two machines cannot be pretended here; None if they can."""
    try:
        with machines(100.0):
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        return f"namespaces with a limited link cannot be made ({error}); it needs root, ip and tc"


@contextmanager
def machines(megabits: float) -> Iterator[list[str]]:
    """Make two network namespaces with a link of this rate between them; remove them at the end."""
    names = [f"olx{os.getpid()}-{number}" for number in range(2)]
    limit = f"tbf rate {megabits:g}mbit burst 256kb latency 400ms".split()
    try:
        for name in names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip(
            "-n",
            names[0],
            "link",
            "add",
            "eth0",
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            names[1],
        )
        for number, name in enumerate(names):
            _ip("-n", name, "addr", "add", f"{NETWORK}.{number + 1}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("netns", "exec", name, "tc", "qdisc", "add", "dev", "eth0", "root", *limit)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def run(arguments: argparse.Namespace, names: Sequence[str], flat: bool) -> dict[str, Any]:
    """Run the workers on both machines; return bytes per machine and step, seconds, and the digests of the sums."""
    each, jobs = arguments.workers, []
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    for rank in range(each * len(names)):
        job = {"rank": rank, "each": each, "world": each * len(names), "rounds": arguments.rounds}
        job |= {"numbers": int(arguments.megabytes * 1e6 / 4)}
        host = f"machine-{rank if flat else rank // each}"
        code = f'hostname {host} && exec "$0" "$@"'
        inside = ["ip", "netns", "exec", names[rank // each], "unshare", "--uts", "sh", "-c", code]
        command = [*inside, sys.executable, __file__, "--job", json.dumps(job)]
        jobs.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    try:
        outputs = [job.communicate(timeout=300)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    if any(job.returncode for job in jobs):
        raise SystemExit("a worker has failed")
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    rounds = zip(*(each["seconds"] for each in found), strict=True)
    return {
        "sent": found[0]["sent"],
        "seconds": median(max(times) for times in rounds),
        "digests": [each["digest"] for each in found],
    }


def worker(job: dict[str, Any]) -> dict[str, Any]:
    rank, world, rounds = job["rank"], job["world"], job["rounds"]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://{NETWORK}.1:29500", rank=rank, world_size=world
    )
    whole, seconds, sent = torch.zeros(job["numbers"]), [], 0
    gradient = TreeSum(whole)
    for turn in range(rounds + 1):  # the first makes the connections
        gradient.begin(world)
        for leaf in collectives.share(world, rank, world):
            with gradient.leaf(leaf):
                whole.copy_(
                    torch.randn(
                        len(whole), generator=torch.Generator().manual_seed(turn * world + leaf)
                    )
                )
        dist.barrier()
        before = int(SENT.read_text())
        dist.barrier()  # nobody sends before it is read
        began = time.perf_counter()
        gradient.finish()
        took = time.perf_counter() - began
        dist.barrier()
        if turn:
            seconds.append(took)
            sent += int(SENT.read_text()) - before
    digest = hashlib.sha256(whole.numpy().tobytes()).hexdigest()
    dist.barrier()
    return {"sent": sent / rounds, "seconds": seconds, "digest": digest}


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
