"""The main job, in the order in which the data flows; pipelines/finetune.py and retrain.py both run it.

Each line is one stage with one file behind it. What a stage has made is found again by the next attempt, so
the same config may be run until it is finished, whatever has stopped it meanwhile.
"""

from collections.abc import Callable, Mapping
from typing import Any

from olora_ray.cluster import address
from olora_ray.cluster.spec import Task
from olora_ray.config.schema import Config
from olora_ray.data.tokenize import spec_from_pretrained
from olora_ray.model import source
from olora_ray.pipeline import fit, publish, report
from olora_ray.pipeline.run_folder import RunFolder

Say = Callable[[str], None]


def run(config: Config, say: Say, tags: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Fine-tune, export, check and register as the config says; returns the content of result.json.

    `tags` are for the registered version, over those that it gets anyway. A run that is finished already is
    only reported. Raises UserError for what the user can fix, TryAgain for what passes by itself, and Stopped
    after a signal.
    """
    folder = RunFolder(config)
    folder.check()
    if done := folder.finished():
        report.already_finished(config, done, say)
        return done
    publish.check_tracking(config, folder)
    address.find()
    base = source.obtain(config, say, publish.registered(config))
    tokenizer = source.load_tokenizer(base, config.model)
    spec = spec_from_pretrained(tokenizer, base.name)
    report.plan(config, base, say)

    with fit.connect(config, say, base) as stop, fit.tokens(config, spec, say) as (training, held_out):
        eos = source.end_tokens(base, tokenizer)
        task = Task(config, base, spec.digest, eos, training.store, held_out, fit.make_board())
        report.steps(task, say)
        outcome = publish.trained(task, folder, say)
        folder.claim()
        with publish.tracked(task, folder) as tracker:
            outcome = outcome or fit.train(task, folder, training, tracker, stop, say)
            parity = fit.run_export(task, folder, outcome, say)
            version = publish.publish(task, folder, tracker, outcome, parity, say, tags or {})
            answers = report.texts(outcome, tokenizer)
            finished = report.finish(task, folder, tracker, outcome, answers, parity, version)
        folder.write_result(finished.result)  # nothing is left to be logged
        finished.show(say)
    return finished.result
