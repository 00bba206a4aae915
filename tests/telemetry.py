"""The metrics as Prometheus sees them."""

import re

from olora_ray.pipeline import prometheus
from olora_ray.retrain.decision_run import METRICS
from tests.ray_head import ROOT


def exported() -> dict[str, str]:
    """Return name in Prometheus -> metric type; a histogram also has _bucket, _sum and _count."""
    kinds = dict.fromkeys([*prometheus.GAUGES, prometheus.WORKERS], "gauge")
    kinds |= dict.fromkeys([prometheus.STEP_SECONDS, prometheus.CHECKPOINT_SECONDS], "histogram")
    return {f"ray_{name}": kind for name, kind in kinds.items()} | {
        f"ray_{prometheus.RESTARTS}_total": "counter"
    }


def of_others() -> set[str]:
    """Return the names of the metrics of nights and of `olora-ray follow`."""
    names = set(METRICS)
    for file in (ROOT / "olora_ray" / "serving").glob("*.py"):
        for kind, name in re.findall(r'(\w+)\(\s*"(olora_follow_\w+)"', file.read_text()):
            names.add(f"{name}_total" if kind == "Counter" else name)
    return names
