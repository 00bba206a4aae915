"""Reads the inputs of some readers, one after the other, and says of each what came of it.

    python -m tests.fuzz.child FOLDER SEED NAME:START:STOP...

Each input is announced by a line of JSON before it is read, and followed by one with the outcome: the parent sees which
input takes too long, or has ended the process.
"""

import importlib
import itertools
import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tests.fuzz.case import Case, WrongResult

MEMORY = 2 * 2**30
"""Bytes that reading an input may take beyond what the process has."""


def main(folder: Path, seed: int, jobs: list[str]) -> None:
    """Read the inputs `START..STOP` of each reader."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what readers print is none of ours
    for job in jobs:
        name, start, stop = job.split(":")
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        reader = importlib.import_module(f"tests.fuzz.readers.{name}")
        place = folder / f"{name}-{start}-{os.getpid()}"
        place.mkdir(parents=True)
        made = reader.prepare(place) if hasattr(reader, "prepare") else None
        if hasattr(reader, "warm"):
            reader.warm(place, made)
        for number, case in enumerate(itertools.islice(reader.cases(seed, made), int(stop))):
            if number >= int(start):
                _limit_memory()
                out.write(json.dumps({"reader": name, "number": number}) + "\n")
                out.write(json.dumps({"reader": name, "number": number, **outcome(reader, case, place, made)}) + "\n")


def outcome(reader: Any, case: Case, place: Path, made: Any) -> dict[str, Any]:
    """What came of one input: kind, message, seconds."""
    from olora_ray.common.errors import UserError
    from olora_ray.data.formats import Rejected

    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kind, message = "ok", ""
    try:
        reader.read(case.content, place, made)
        if case.refuse:
            kind, message = "wrong", "read without an error"
    except (UserError, Rejected) as error:
        kind, message = "refused", str(error)
        if "\n" in message or len(message) > 12_000:
            kind, message = "traceback", f"not one line: {message[:300]!r}"
    except WrongResult as error:
        kind, message = "wrong", str(error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        kind, message = "traceback", _where(error)
    words = message.lower()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if "memoryerror" in words or "cannot allocate" in words or "bad_alloc" in words or grown > MEMORY:
        kind = "large"
    return {"kind": kind, "message": message[:600], "seconds": round(time.monotonic() - begun, 3)}


def _where(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/olora_ray/" in frame.filename]
    place = f"{frames[-1].filename.partition('/olora_ray/')[2]}:{frames[-1].lineno}" if frames else "outside"
    return f"{type(error).__name__} at {place}: {str(error)[:300]}"


def _limit_memory() -> None:
    """Anew for each input: addresses that were used and given back stay in a process, hundreds of MB after a while."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
