"""The modules of pipelines/comparison are found as they are by pipelines/compare.py, whose folder Python searches."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "pipelines"))
