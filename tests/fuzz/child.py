"""Reads the inputs of some readers, one after the other, and says of each what came of it.

    python -m tests.fuzz.child FOLDER SEED NAME:COUNT...

Each input is announced by its name before it is read, and followed by a line of JSON with the outcome: the parent sees
which input has ended the process. An input that takes too long does so.
"""

import importlib
import itertools
import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

# Bytes that reading an input may take beyond what the process has.
MEMORY = 2 * 2**30
# Seconds of a processor for one input: on a busy machine as many as on an idle one.
LATE = 10.0


def main(folder: Path, seed: int, jobs: list[str]) -> None:
    """Read the first COUNT inputs of each reader."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what readers print is none of ours
    for job in jobs:
        name, count = job.split(":")
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        reader = importlib.import_module(f"tests.fuzz.readers.{name}")
        place = folder / name
        place.mkdir(parents=True)
        made = reader.prepare(place) if hasattr(reader, "prepare") else None
        if hasattr(reader, "warm"):
            reader.warm(place, made)
        for number, content in enumerate(itertools.islice(reader.cases(seed, made), int(count))):
            _limit_memory()
            out.write(f"{name} {number}\n")
            signal.setitimer(signal.ITIMER_PROF, LATE)
            kind, message = outcome(reader, content, place, made)
            signal.setitimer(signal.ITIMER_PROF, 0)
            out.write(json.dumps([kind, message[:600]]) + "\n")


def outcome(reader: Any, content: Any, place: Path, made: Any) -> tuple[str, str]:
    """What came of one input, and the message."""
    from olora_ray.common.errors import UserError
    from olora_ray.data.formats.format import Rejected

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kind, message = "ok", ""
    try:
        reader.read(content, place, made)
    except (UserError, Rejected) as error:
        kind, message = "refused", str(error)
        if "\n" in message or len(message) > 12_000:
            kind, message = "traceback", f"not one line: {message[:300]!r}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of Rust code is no Exception
        kind, message = "traceback", "".join(traceback.format_exception(error)[-2:])
    words = message.lower()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if (
        "memoryerror" in words
        or "cannot allocate" in words
        or "bad_alloc" in words
        or grown > MEMORY
    ):
        kind = "large"
    return kind, message


def _limit_memory() -> None:
    """Anew for each input: addresses that were used and given back stay in a process, hundreds of MB after a while."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
