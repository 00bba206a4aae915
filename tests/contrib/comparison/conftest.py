"""Put pipelines/contrib on the path, as compare.py does; a tiny model and a corpus for its runs."""

import sys
from pathlib import Path

from tests.pipelines.conftest import corpus, tiny_model  # noqa: F401  # fixtures

sys.path.append(str(Path(__file__).parents[3] / "pipelines" / "contrib"))
