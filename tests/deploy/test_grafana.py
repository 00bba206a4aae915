"""The dashboard shows every metric that the project exports, and no others."""

import json
import re
from pathlib import Path
from typing import Any

from olora_ray.pipeline import prometheus

ROOT = Path(__file__).parents[2]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana" / "olora_ray.json").read_text())
ENDINGS = {"histogram": ("_bucket", "_sum", "_count"), "gauge": ("",), "counter": ("",)}


def queries() -> list[str]:
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return panels + [entry["query"] for entry in DASHBOARD["templating"]["list"] if entry["type"] == "query"]


def series() -> dict[str, str]:
    """Return the name of each Prometheus series -> the metric that it belongs to."""
    return {f"{name}{end}": name for name, kind in prometheus.exported().items() for end in ENDINGS[kind]}


def test_every_series_of_the_dashboard_is_exported_and_every_metric_is_shown() -> None:
    used = {name for query in queries() for name in re.findall(r"\bray_\w+", query)}
    assert used - series().keys() == set()
    assert {series()[name] for name in used} == prometheus.exported().keys()


def test_every_panel_follows_the_chosen_run_and_data_source() -> None:
    for panel in DASHBOARD["panels"]:
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            assert target["expr"].count("ray_olora") == target["expr"].count('{run=~"$run"}')


def test_panels_have_places_of_their_own() -> None:
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
