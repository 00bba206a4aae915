"""Put pipelines/contrib/mobility on the path, because its modules import each other by name."""

import sys
from pathlib import Path

from tests.pipelines.conftest import tiny_model  # noqa: F401  # fixture

MOBILITY = Path(__file__).parents[3] / "pipelines" / "contrib" / "mobility"

sys.path.append(str(MOBILITY))
