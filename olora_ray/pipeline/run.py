"""The stages of a run in their order; pipelines/finetune.py and pipelines/retrain.py both run them.

Each stage is one module, and it passes its results on to the next stage. The next attempt reuses the files that a stage
has written, so a run that was stopped resumes with the same command.
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from olora_ray.cluster import address
from olora_ray.cluster.connection import Stop, connect
from olora_ray.cluster.decide import DataDecisions, decide
from olora_ray.cluster.preflight import ClusterFacts
from olora_ray.cluster.spec import TrainResult, TrainSpec
from olora_ray.common import lock, storage
from olora_ray.common.errors import TakenOver, TryAgain
from olora_ray.config.schema import Config
from olora_ray.config.section import Source
from olora_ray.pipeline import export, fit, look, prepare, publish, report
from olora_ray.pipeline.answers import answered, judged, means
from olora_ray.pipeline.base import Base, open_base
from olora_ray.pipeline.run_folder import RunFolder, RunState


@dataclass(frozen=True)
class Driver:
    """The only process that works on a run; `only_driver` creates it."""

    lease: lock.Lock

    def check(self) -> None:
        """Raise TakenOver if another process has taken the lock of the run, or if the lock cannot be read.

        Call it before an action that must not happen twice, such as a registration.
        """
        try:
            self.lease.check()
        except TryAgain as error:
            how = "the other process resumes the run"
            if isinstance(error, lock.LockUnreadable):
                how = "run the same command again to resume"
            raise TakenOver(f"{error}; {how}", error.exit_code) from error

    @contextlib.contextmanager
    def watch(self, stop: Stop, every: float = 10.0) -> Iterator[None]:
        """Raise TakenOver in the block once another process has taken the lock; checks every `every` seconds."""
        ended = threading.Event()

        def work() -> None:
            while not ended.wait(every):
                try:
                    self.check()
                except TakenOver as error:
                    # An unreachable storage is no reason to stop here: the training itself retries and reports it.
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
    """Hold the lock of the run; raise TryAgain with the holder if another process works on the run."""
    name = config.run.name
    path = storage.join(config.run.storage, "locks", "runs", f"{name}.json")
    with lock.held(path, f"run.name: {name!r}", remedy="set another run.name") as lease:
        yield Driver(lease)


def run(
    config: Config,
    tags: Mapping[str, str] | None = None,
    base: Base | None = None,
    found: Mapping[str, Source] | None = None,
    on_row: fit.OnRow | None = None,
) -> dict[str, Any]:
    """Fine-tune, export, check and register as the config says; return the content of result.json.

    `tags` are set on the registered version, and override its own tags. `base` is the config's base model if the
    caller has opened it, `found` the result of `detect.check_data`. `on_row` gets
    the metrics of each step. A finished run is only reported. Raises
    UserError for a problem that the user can fix, TryAgain for one that passes (another driver works on the run, MLflow
    does not answer), and Stopped after a signal.
    """
    folder = RunFolder(config.folder())
    done = _finished(config, folder.check(config))
    if done:
        return done
    publish.check_tracking(config, folder)
    address.find()
    with only_driver(config) as driver:
        # Another driver may have finished it before this one got the lock.
        state = folder.check(config)
        done = _finished(config, state)
        if done:
            return done
        base = base or open_base(config)
        publish.check_license(config, base.model)
        prepare.check_settings(config)
        data = prepare.read_data(config, base, state.kept, found)
        return _run(config, data, folder, state, driver, tags or {}, base, on_row)


def _finished(config: Config, state: RunState) -> dict[str, Any] | None:
    done = state.finished(config)
    if done:
        # Other paths may have other contents, and this result would not be theirs.
        if state.moved(config):
            base = open_base(config)
            data = prepare.read_data(config, base, state.kept)
            state.require_same(config, prepare.contents(data.config, base))
        report.already_finished(config, state, done)
    return done


def _run(
    config: Config,
    data: DataDecisions,
    folder: RunFolder,
    state: RunState,
    driver: Driver,
    tags: Mapping[str, str],
    base: Base,
    on_row: fit.OnRow | None,
) -> dict[str, Any]:
    state.require_same(config, {"base model": base.model.digest, "tokenizer": base.spec.digest})
    # The first checks come before Ray starts, so what this machine would decide is enough.
    here = ClusterFacts.here(config.cluster)
    prepare.plan(decide(config, data, base.model, here, state.kept), base.model)

    with connect(config, trains=True) as (stop, cluster), driver.watch(stop):
        decided = prepare.decided(config, data, base.model, cluster, state.kept)
        prepared = prepare.prepare_tokens(
            decided.config,
            base,
            decided.size.total_bytes(),
            decided.decisions,
            guard=decided.config.evaluation.guard,
            check=partial(state.require_same, config),
        )
        time = decided.step_time()
        spec = replace(prepared.spec, step_seconds=time.seconds if time else 0.0)
        with prepared.build as build:
            prepare.say_steps(spec)
            result = fit.finished_training(spec, folder, state)
            folder.write_config(config, decided.decisions, state)
            with publish.tracked(spec, folder) as tracker:
                result = result or fit.train(spec, folder, build, tracker, stop, on_row)
                exported = export.run_export(spec, folder, result)
                answers = answered(result, base.tokenizer)
                scored = judged(config, answers)  # a scorer that fails stops the registration
                scores = means(config, answers, scored)
                publish.log_scores(exported, tracker, answers, scores)
                driver.check()
                content = publish.publish(exported, tracker, tags, scores)
                url = tracker.url()
                facts = dict(report.facts(exported, content))
                ended = look.Ended(
                    folder.root,
                    config,
                    exported.state,
                    content,
                    answers,
                    scored,
                    look.special_tokens(base.tokenizer),
                    facts,
                    look.held_out_rows(spec.eval),
                )
                verdict = look.write(ended, tracker.url())
                tracker.tags({"mlflow.note.content": look.note(verdict, facts)})
                driver.check()
            # Last: result.json marks the run as finished, so an earlier failure is retried by the next attempt.
            folder.write_result(content)
            shown = [replace(each, prompt=look.plain(each.prompt, ended.marks)) for each in answers]
            report.finished(exported, shown, content, url, verdict)
    return content


def register(
    spec: TrainSpec,
    folder: RunFolder,
    result: TrainResult,
    tags: Mapping[str, str],
    parent: str | None = None,
) -> int | None:
    """Export, check and register a finished training, such as a trial of a search; return the version.

    `parent` is the id of the search's MLflow run. Raises UserError if the exports disagree with the trained model.
    """
    with publish.tracked(spec, folder, parent) as tracker:
        return publish.register(export.run_export(spec, folder, result), tracker, tags)
