"""The main job in the order in which data flows; pipelines/finetune.py and retrain.py both run it.

Each line is one stage with one file behind it. What a stage has made is found again by the next attempt, so
the same config may be run until it is finished, whatever has stopped it meanwhile.
"""

from collections.abc import Mapping
from typing import Any

from olora_ray.cluster import address
from olora_ray.config.schema import Config
from olora_ray.pipeline import export, fit, publish, report
from olora_ray.pipeline.answers import answered
from olora_ray.pipeline.base import open_base
from olora_ray.pipeline.connection import connect
from olora_ray.pipeline.mlflow_run import check_tracking, tracked
from olora_ray.pipeline.prepare import prepare_tokens
from olora_ray.pipeline.run_folder import RunFolder


def run(config: Config, tags: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Fine-tune, export, check and register as the config says; returns the content of result.json.

    `tags` are for the registered version, over those that it gets anyway. A run that is finished already is
    only reported. Raises UserError for what the user can fix, TryAgain for what passes by itself, and Stopped
    after a signal.
    """
    folder = RunFolder(config)
    folder.check()
    if done := folder.finished():
        report.already_finished(config, done)
        return done
    check_tracking(config, folder)
    address.find()
    base = open_base(config)
    report.plan(config, base.model)

    with connect(config, base.model) as stop:
        spec, build = prepare_tokens(config, base)
        with build:
            report.steps(spec)
            result = fit.finished_training(spec, folder)
            folder.claim()
            with tracked(spec, folder) as tracker:
                result = result or fit.train(spec, folder, build, tracker, stop)
                parity = export.run_export(spec, folder, result)
                answers = answered(result, base.tokenizer)
                scores = publish.log_results(spec, tracker, result, answers)
                version = publish.publish(spec, folder, tracker, result, parity, tags or {})
                published = publish.finish(spec, tracker, result, scores, parity, version)
            folder.write_result(published.result)  # nothing is left to be logged
            report.finished(config, folder, result, answers, published)
    return published.result
