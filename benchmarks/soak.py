"""A run on two hosts to which something happens all the time: a long proof that it ends as if nothing had.

Two hosts in network namespaces, one worker each, a tiny model. Every 20 to 60 seconds, drawn from a seed: a worker is
killed, stopped for a while or fails; a host is drained or killed, and comes back; its link is cut; Train's controller
is killed; the driver gets SIGTERM or SIGKILL, and the same command is given again. The end must be that of the same
config when nobody touches it: the adapter's bytes, every metric once, one registered version. Needs root.

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
    """Run, and print what happened; 1 if anything is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="of events; the run nobody touches comes before")
    parser.add_argument("--seed", type=int, default=1, help="of the events")
    parser.add_argument("--logs", type=Path, help="folder for what the commands have printed")
    args = parser.parse_args()
    if os.geteuid() != 0 or not hosts.possible():
        raise SystemExit("needs root and network namespaces")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started is removed then, too
    say = soak.timed(lambda text: print(text, file=sys.stderr, flush=True))
    with tempfile.TemporaryDirectory(prefix="olr-soak-", dir="/tmp") as folder:
        tiny = Path(folder) / "project"
        tiny.mkdir()
        report = soak.soak(project.make_tiny(tiny), Path(folder), args.minutes, args.seed, say, args.logs)
    print(f"\n{args.minutes:g} minutes, seed {args.seed}: {report.text()}")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
