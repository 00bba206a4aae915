"""The outcome of a comparison: written, logged to MLflow and said."""

import logging
import math

from olora_ray.common import copies, storage
from olora_ray.sweep.compare import page, table, verdict
from olora_ray.sweep.compare.record import ComparisonRecord
from olora_ray.tracking.run import Tracker

logger = logging.getLogger(__name__)


def conclude(record: ComparisonRecord, folder: str, tracker: Tracker) -> None:
    """Write page, figures and comparison.json, log them to MLflow, and say what came out."""
    for file in page.write(record, folder):
        with copies.fetched(file) as local:
            tracker.artifact(local)
    tracker.table("methods", list(table.HEAD), [table.cells(record, each) for each in record.methods])
    tracker.metrics({0: metrics(record)})
    tracker.tags({f"olora.verdict.{each.method}": verdict.sentence(record, each) for each in record.others()})
    for line in [*table.lines(record), *table.summary(record)]:
        logger.info(line)
    logger.info(f"report: {storage.join(folder, 'report.html')}")


def metrics(record: ComparisonRecord) -> dict[str, float]:
    """Numbers for MLflow: loss/METHOD, difference/METHOD and the bounds of its adjusted interval."""
    found = {f"loss/{each.method}": each.loss for each in record.methods if each.loss is not None}
    for each in record.others():
        if each.against is not None:
            bounds = each.against.adjusted
            found |= {f"difference/{each.method}": each.against.mean}
            found |= {f"difference_low/{each.method}": bounds.low, f"difference_high/{each.method}": bounds.high}
    return {name: value for name, value in found.items() if math.isfinite(value)}
