"""The dashboard shows every metric that the project exports, and no others."""

import re

from tests.prometheus import panels
from tests.telemetry import exported, of_others

ENDINGS = {"histogram": ("_bucket", "_sum", "_count"), "gauge": ("",), "counter": ("",)}


def series() -> dict[str, str]:
    """Return the name of each Prometheus series -> the metric that it belongs to."""
    return {f"{name}{end}": name for name, kind in exported().items() for end in ENDINGS[kind]}


def test_every_series_of_the_dashboard_is_exported_and_every_metric_is_shown() -> None:
    used = {
        name for query in panels().values() for name in re.findall(r"\b(?:ray|olora)_\w+", query)
    }
    assert used - of_others() - series().keys() == set()
    assert {series().get(name, name) for name in used} == exported().keys() | of_others()
