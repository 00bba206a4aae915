"""The main job in the order in which data flows; pipelines/finetune.py and retrain.py both run it.

Each line is one stage with one file behind it, and each stage gets what the one before it has found out. What a stage
has made is found again by the next attempt, so the same config may be run until it is finished, whatever has stopped
it meanwhile.
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from olora_ray.cluster import address
from olora_ray.cluster.spec import TrainResult, TrainSpec
from olora_ray.common import lock, storage
from olora_ray.common.errors import TakenOver, TryAgain
from olora_ray.config.schema import Config
from olora_ray.pipeline import export, fit, prepare, publish, report
from olora_ray.pipeline.answers import answered
from olora_ray.pipeline.base import open_base
from olora_ray.pipeline.connection import Stop, connect
from olora_ray.pipeline.run_folder import RunFolder


class Driver:
    """This process as the one that works on a run; made by `only_driver`."""

    def __init__(self, lease: lock.Lock) -> None:
        self._lease = lease

    def check(self) -> None:
        """Raise TakenOver if another process works on the run by now, or may do so since that cannot be read.

        Call it before what must not be done twice.
        """
        try:
            self._lease.check()
        except TryAgain as error:
            who = "the same command" if isinstance(error, lock.LockUnreadable) else "that process"
            raise TakenOver(f"{error}; {who} resumes the run", error.exit_code) from error

    @contextlib.contextmanager
    def watch(self, stop: Stop, every: float = 10.0) -> Iterator[None]:
        """End the block, wherever it is, with TakenOver once another process works on the run.

        Looks after each `every` seconds.
        """
        ended = threading.Event()

        def work() -> None:
            while not ended.wait(every):
                try:
                    self.check()
                except TakenOver as error:
                    # A storage that does not answer ends nothing: the training notices that by itself.
                    if not isinstance(error.__cause__, lock.LockUnreadable):
                        stop.abandon(error)
                        return

        watcher = threading.Thread(target=work, name="driver", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()


@contextlib.contextmanager
def only_driver(config: Config) -> Iterator[Driver]:
    """This process as the only one that works on the config's run; raises TryAgain that says who else does."""
    name = config.run.name
    place = storage.join(config.run.storage, "locks", "runs", f"{name}.json")
    with lock.held(place, f"run.name: {name!r}", remedy="choose another run.name") as lease:
        yield Driver(lease)


def run(config: Config, tags: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Fine-tune, export, check and register as the config says; returns the content of result.json.

    `tags` are for the registered version, over those that it gets anyway. A run that is finished already is
    only reported. Raises UserError for what the user can fix, TryAgain for what passes by itself (another driver
    works on the run, MLflow does not answer), and Stopped after a signal.
    """
    folder = RunFolder(config)
    if done := _finished(folder):
        return done
    publish.check_tracking(config, folder)
    address.find()
    with only_driver(config) as driver:
        # Another driver may have worked on it until now.
        return _finished(folder) or _run(folder, driver, tags or {})


def _finished(folder: RunFolder) -> dict[str, Any] | None:
    """Check the folder; return and report the result of a run that is finished already."""
    folder.check()
    if done := folder.finished():
        if folder.moved():
            folder.require_same(prepare.contents(folder.config, open_base(folder.config)))
        report.already_finished(folder, done)
    return done


def _run(folder: RunFolder, driver: Driver, tags: Mapping[str, str]) -> dict[str, Any]:
    base = open_base(folder.config)
    config = folder.config = prepare.with_length(folder.config, base)
    folder.require_same({"base model": base.model.digest, "tokenizer": base.spec.digest})
    prepare.plan(config, base.model)

    with connect(config, base.model) as stop, driver.watch(stop):
        prepared = prepare.prepare_tokens(config, base, check=folder.require_same)
        spec = prepared.spec
        with prepared.build as build:
            prepare.say_steps(spec)
            result = fit.finished_training(spec, folder)
            folder.claim()
            with publish.tracked(spec, folder) as tracker:
                result = result or fit.train(spec, folder, build, tracker, stop)
                exported = export.run_export(spec, folder, result)
                answers = answered(result, base.tokenizer)
                scores = publish.log_scores(exported, tracker, answers)
                driver.check()
                published = publish.publish(exported, tracker, tags, scores)
                driver.check()
            folder.write_result(published.result)  # nothing is left to be logged
            report.finished(exported, answers, published.result, published.page)
    return published.result


def register(
    spec: TrainSpec, folder: RunFolder, result: TrainResult, tags: Mapping[str, str], parent: str | None = None
) -> int | None:
    """Export, check and register a training that has ended, as a trial of a search has; returns the version.

    `parent` is the id of the search's MLflow run. Raises UserError if the exports disagree.
    """
    with publish.tracked(spec, folder, parent) as tracker:
        return publish.register(export.run_export(spec, folder, result), tracker, tags)
