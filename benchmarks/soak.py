"""A long run on two hosts with permanent failures, which must end as if nothing had happened.

Two hosts in network namespaces train a tiny model with one worker each. Every 20 to 60 seconds, drawn from a seed,
one event happens: a worker is killed, is paused or fails; a host is drained or killed, and returns; its network link
is cut; Train's controller is killed; or the driver gets SIGTERM or SIGKILL, and the same command is run again. The
end must equal that of an untouched run of the same config: the adapter's bytes, every metric once, one registered
version. Needs root.

    python benchmarks/soak.py [--minutes 60] [--seed 1] [--logs FOLDER]
"""

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.pipelines import project
from tests.recovery import hosts, soak


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=60.0,
        help="duration of the events; an untouched run comes first",
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the events")
    parser.add_argument("--logs", type=Path, help="folder for the output of the commands")
    args = parser.parse_args()
    if os.geteuid() != 0 or not hosts.possible():
        raise SystemExit("this benchmark needs root and network namespaces")
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # what was started is removed then, too
    say = soak.timed(lambda text: print(text, file=sys.stderr, flush=True))
    with tempfile.TemporaryDirectory(prefix="olr-soak-", dir="/tmp") as folder:
        tiny = Path(folder) / "project"
        tiny.mkdir()
        report = soak.soak(
            project.make_tiny(tiny), Path(folder), args.minutes, args.seed, say, args.logs
        )
    print(f"\n{args.minutes:g} minutes, seed {args.seed}: {report.text()}")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
