"""System metrics of a run: CPU, memory, disk, network and GPUs of this machine, sampled until the run ends."""

import logging
import threading
from typing import Any

from olora_ray.tracking.client import reason
from olora_ray.tracking.write_queue import WriteQueue

logger = logging.getLogger(__name__)


def watch_system(uri: str, run_id: str, seconds: float, queue: WriteQueue, stop: threading.Event) -> None:
    """Sample with MLflow's samplers every `seconds`. MLflow's own loop ends for good when one request fails."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    make: Any = SystemMetricsMonitor
    monitor: Any = None
    while not stop.wait(seconds):
        if not queue.online:
            continue  # making the monitor would wait for a locked database
        try:
            monitor = monitor or make(run_id, seconds, tracking_uri=uri)
            monitor.collect_metrics()
            queue.system(monitor.aggregate_metrics())
            for sampler in monitor.monitors:
                sampler.clear_metrics()
        except Exception as error:
            logger.warning("no more metrics of this machine: %s", reason(error))
            return
