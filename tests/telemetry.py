"""The metrics of a training as Prometheus sees them."""

from olora_ray.pipeline import prometheus


def exported() -> dict[str, str]:
    """Return name in Prometheus -> metric type; a histogram also has _bucket, _sum and _count."""
    kinds = dict.fromkeys([*prometheus.GAUGES, prometheus.WORKERS], "gauge")
    kinds |= dict.fromkeys([prometheus.STEP_SECONDS, prometheus.CHECKPOINT_SECONDS], "histogram")
    return {f"ray_{name}": kind for name, kind in kinds.items()} | {
        f"ray_{prometheus.RESTARTS}_total": "counter"
    }
