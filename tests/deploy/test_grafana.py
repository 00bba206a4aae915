"""The dashboard shows every metric that the project exports, and no others."""

import json
import re
from pathlib import Path
from typing import Any

from olora_ray.retrain.decision_run import METRICS
from tests.telemetry import exported

ROOT = Path(__file__).parents[2]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana" / "olora_ray.json").read_text())
ENDINGS = {"histogram": ("_bucket", "_sum", "_count"), "gauge": ("",), "counter": ("",)}


def queries() -> list[str]:
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return panels + [
        entry["query"] for entry in DASHBOARD["templating"]["list"] if entry["type"] == "query"
    ]


def series() -> dict[str, str]:
    """Return the name of each Prometheus series -> the metric that it belongs to."""
    return {f"{name}{end}": name for name, kind in exported().items() for end in ENDINGS[kind]}


def test_every_series_of_the_dashboard_is_exported_and_every_metric_is_shown() -> None:
    used = {name for query in queries() for name in re.findall(r"\b(?:ray|olora)_\w+", query)}
    assert used - METRICS.keys() - series().keys() == set()
    assert {series().get(name, name) for name in used} == exported().keys() | METRICS.keys()
