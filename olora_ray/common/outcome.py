"""Lines of JSON, apart from its output, with which a command tells deploy/night.py of its end and its notifications.

The output may contain rows of data, which must not decide whether a failure is told. VARIABLE names the
way: the descriptor of a pipe, as NUMBER:INODE, because a child of the command may have another file there; else a word
that nobody else knows, which begins such lines in the output of a job on a cluster (deploy/submit.py).
"""

import contextlib
import json
import os
from typing import Any

VARIABLE = "OLORA_OUTCOME"


def tell(**facts: Any) -> None:
    """Tell the process that started this command some `facts`, if it has asked for them.

    `sent`: an event of which a person was notified; `reason`: why the command ends without success; `busy_since`:
    since when another process does this work, in seconds since 1970.
    """
    way = os.environ.get(VARIABLE, "")
    line = json.dumps(facts)
    number, colon, inode = way.partition(":")
    if not colon:
        if way:
            print(f"{way} {line}", flush=True)
        return
    with contextlib.suppress(OSError):
        if os.fstat(int(number)).st_ino == int(inode):
            os.write(int(number), f"{line}\n".encode())
