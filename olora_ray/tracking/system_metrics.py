"""This machine's CPU, memory, disk, network and GPUs, sampled for a run until it ends."""

import logging
import threading
from typing import TYPE_CHECKING, Any

from olora_ray.tracking.client import reason
from olora_ray.tracking.write_queue import WriteQueue

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)


def watch_system(uri: str, run_id: str, seconds: float, outbox: WriteQueue, stop: threading.Event) -> None:
    """MLflow's samplers without its loop, which ends for good at the first request that fails."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    make: Any = SystemMetricsMonitor
    monitor: Any = None
    while not stop.wait(seconds):
        if not outbox.online:
            continue  # making the monitor would wait for a locked database
        try:
            monitor = monitor or make(run_id, seconds, tracking_uri=uri)
            monitor.collect_metrics()
            outbox.system(monitor.aggregate_metrics())
            for sampler in monitor.monitors:
                sampler.clear_metrics()
        except Exception as error:
            logger.warning("no more metrics of this machine: %s", reason(error))
            return
