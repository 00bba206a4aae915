"""What was freed goes back to the system when that is asked for."""

import subprocess
import sys

CODE = """
import numpy as np
from olora_ray.common import malloc

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS:")) / 1e3

before = resident()
parts = [np.ones(2000) for _ in range(8000)]  # 16 kB each, as the units of a file
kept = [object() for _ in range(1000)]  # behind them
taken = resident() - before
del parts
held = resident() - before
malloc.give_back()
print(taken, held, resident() - before)
"""


def test_the_memory_of_many_small_arrays_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=60, check=True)
    taken, _, left = map(float, done.stdout.split())
    assert taken > 100
    assert left < 20
