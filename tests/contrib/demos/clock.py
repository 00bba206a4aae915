"""An olora-ray command on another day: its clock differs from this machine's by the seconds in a file.

python -m tests.contrib.demos.clock FILE COMMAND [ARGUMENTS ...]
"""

import runpy
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    file = Path(sys.argv.pop(1))
    real = time.time
    time.time = lambda: real() + float(file.read_text())  # before the imports that take it
    runpy.run_module("olora_ray", run_name="__main__", alter_sys=True)
