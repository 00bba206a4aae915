"""Put pipelines/mobility on the path, because its modules import each other by name."""

import sys
from pathlib import Path

COMMANDS = Path(__file__).parents[2] / "pipelines"

sys.path.append(str(COMMANDS / "mobility"))
