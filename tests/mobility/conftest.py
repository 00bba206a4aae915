"""The modules of pipelines/mobility import each other by name, as Python finds them for a command there."""

import sys
from pathlib import Path

COMMANDS = Path(__file__).parents[2] / "pipelines"

sys.path.append(str(COMMANDS / "mobility"))
