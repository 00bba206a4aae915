"""An evaluation from Python: as `olora-ray evaluate`, on rows in memory too, and with metrics over all answers."""

from collections.abc import Sequence
from typing import Any

from olora_ray.calls import rows
from olora_ray.common import storage
from olora_ray.evaluation import results, targets
from olora_ray.train.scoring import Metric


def evaluate(
    model: str,
    config: str | None,
    given: dict[str, Any],
    data: rows.Given,
    metrics: Sequence[Metric],
) -> dict[str, float]:
    """Return the metrics of a model; `given` are dotted fields, and `data` is None for the rows of the config."""
    shared = targets.settings((model,), config, given)
    if metrics and not shared.evaluation.scorer:
        given["evaluation.scorer"] = "exact_match"  # only answers that are scored are generated
    if data is not None:
        found, text = rows.sources(data, "data")
        if text:
            folder = targets.run_of(model) or storage.join(shared.run.storage, "evaluation")
            rows.write(found, text, storage.join(folder, "rows"))
        given |= {"data.eval": found, "data.eval_fraction": None}
    (measured,), _ = results.run(results.EvalRequest((model,), config, given, own=metrics))
    return measured.metrics()
