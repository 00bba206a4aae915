"""Put pipelines/ on the path, where pipelines/compare.py finds the modules of pipelines/comparison."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "pipelines"))
