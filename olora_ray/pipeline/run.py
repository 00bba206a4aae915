"""The main job in the order in which data flows; pipelines/finetune.py and retrain.py both run it.

Each line is one stage with one file behind it. What a stage has made is found again by the next attempt, so
the same config may be run until it is finished, whatever has stopped it meanwhile.
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from olora_ray.cluster import address
from olora_ray.common import lock, storage
from olora_ray.common.errors import TakenOver, TryAgain
from olora_ray.config.schema import Config
from olora_ray.pipeline import export, fit, publish, report
from olora_ray.pipeline.answers import answered
from olora_ray.pipeline.base import open_base
from olora_ray.pipeline.connection import Stop, connect
from olora_ray.pipeline.prepare import contents, prepare_tokens
from olora_ray.pipeline.publish import check_tracking, tracked
from olora_ray.pipeline.run_folder import RunFolder

# One driver a run: a second one that is given the same run.name leaves, or waits, and says who works on it.


LOOK = 10.0
"""Seconds between two looks at whether the run is still ours."""


class Driver:
    """This process as the one that works on a run; made by `only_driver`."""

    def __init__(self, lease: lock.Lock) -> None:
        self._lease = lease

    def check(self) -> None:
        """Raise TakenOver if another process works on the run by now, or may do so since that cannot be read.

        Call it before what must not be done twice.
        """
        try:
            self._look()
        except lock.LockUnreadable as error:
            raise TakenOver(f"{error}; the same command goes on with the run", error.exit_code) from None

    @contextlib.contextmanager
    def watch(self, stop: Stop) -> Iterator[None]:
        """End the block, wherever it is, with TakenOver once another process works on the run."""
        ended = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(stop, ended), name="driver", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()

    def _watch(self, stop: Stop, ended: threading.Event) -> None:
        while not ended.wait(LOOK):
            try:
                self._look()
            except TakenOver as error:
                stop.abandon(error)
                return
            except lock.LockUnreadable:
                continue  # the storage does not answer: the training notices that by itself

    def _look(self) -> None:
        """Raise TakenOver if another process works on the run by now, LockUnreadable if that cannot be said."""
        try:
            self._lease.check()
        except lock.LockUnreadable:
            raise
        except TryAgain as error:
            raise TakenOver(f"{error}; it goes on with the run", error.exit_code) from None


@contextlib.contextmanager
def only_driver(config: Config) -> Iterator[Driver]:
    """This process as the only one that works on the config's run, for the block.

    Waits `run.wait` seconds for another one to end. Raises TryAgain that says who it is if it has not.
    """
    name = config.run.name
    place = storage.join(config.run.storage, "locks", "runs", f"{name}.json")
    remedy = "choose another run.name, or set run.wait to wait for it"
    with lock.held(place, f"run.name: {name!r}", config.run.wait, remedy) as lease:
        yield Driver(lease)


def run(config: Config, tags: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Fine-tune, export, check and register as the config says; returns the content of result.json.

    `tags` are for the registered version, over those that it gets anyway. A run that is finished already is
    only reported. Raises UserError for what the user can fix, TryAgain for what passes by itself (another driver
    works on the run, MLflow does not answer), and Stopped after a signal.
    """
    folder = RunFolder(config)
    folder.check()
    if done := _finished(config, folder):
        return done
    check_tracking(config, folder)
    address.find()
    with only_driver(config) as driver:
        folder.check()  # another driver may have worked on it until now
        return _finished(config, folder) or _run(config, folder, driver, tags or {})


def _finished(config: Config, folder: RunFolder) -> dict[str, Any] | None:
    """The result of a run that is finished already, which is then reported."""
    if done := folder.finished():
        if folder.moved():
            folder.require_same(contents(config, open_base(config)))
        report.already_finished(folder, done)
    return done


def _run(config: Config, folder: RunFolder, driver: Driver, tags: Mapping[str, str]) -> dict[str, Any]:
    base = open_base(config)
    folder.require_same({"base model": base.model.digest, "tokenizer": base.spec.digest})
    report.plan(config, base.model)

    with connect(config, base.model) as stop, driver.watch(stop):
        spec, build = prepare_tokens(config, base, check=folder.require_same)
        with build:
            report.steps(spec)
            result = fit.finished_training(spec, folder)
            folder.claim()
            with tracked(spec, folder) as tracker:
                result = result or fit.train(spec, folder, build, tracker, stop)
                parity = export.run_export(spec, folder, result)
                answers = answered(result, base.tokenizer)
                scores = publish.log_results(spec, tracker, result, answers)
                driver.check()
                version = publish.publish(spec, folder, tracker, result, parity, tags, scores)
                published = publish.finish(spec, tracker, result, scores, parity, version)
                driver.check()
            folder.write_result(published.result)  # nothing is left to be logged
            report.finished(config, folder, result, answers, published)
    return published.result
