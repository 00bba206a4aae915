"""The publication of a finished run in MLflow: its results, its registered version, and the push to a hub."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any

from olora_ray.cluster.spec import TrainSpec
from olora_ray.common import node_cache, storage
from olora_ray.common.errors import UserError, as_user_error, first_line
from olora_ray.common.retry import is_temporary
from olora_ray.config.load import flatten, with_model
from olora_ray.config.schema import Config
from olora_ray.model.source import BaseModel
from olora_ray.pipeline.answers import Sample, Scores
from olora_ray.pipeline.export import Exported, license_of
from olora_ray.pipeline.run_folder import (
    Fingerprint,
    RunFolder,
    by_step,
    main_score,
    settings_digest,
)
from olora_ray.pipeline.version import contents_of
from olora_ray.tracking import checksums, client, models
from olora_ray.tracking.aliases import CHALLENGER, CHAMPION, Aliases
from olora_ray.tracking.run import Tracker
from olora_ray.tracking.start import check_artifacts, mlflow_run, resolve_uri

logger = logging.getLogger(__name__)

# The MLflow run of a training: created or resumed, and closed.


def check_tracking(config: Config, folder: RunFolder) -> None:
    """Raise UserError if MLflow or the hub does not answer or take the results."""
    uri = resolve_uri(config)
    registry = config.registry
    if registry.key:
        checksums.check_key(registry.key)
    elif registry.verify and registry.alias in (CHAMPION, CHALLENGER):
        raise UserError(
            "registry.verify: set registry.key, too; without a signature the new version could not be compared or used"
        )
    # A resumed run needs neither until it has results, so an outage does not delay it.
    if folder.tracking_run(uri, config.run.storage) is None:
        client.check_uri(uri)
        check_artifacts(config, uri)
        if config.export.push:
            check_hub(config.export.push)


@contextmanager
def tracked(spec: TrainSpec, folder: RunFolder, parent: str | None = None) -> Iterator[Tracker]:
    """Create or resume the MLflow run, and close it as FINISHED, FAILED or KILLED.

    `parent` is the id of the search's MLflow run if this run is a trial.
    """
    config = spec.config
    tags = {
        "olora.base_digest": spec.base.digest,
        "olora.method": config.adapter.method,
        "olora.auto": ",".join(sorted(spec.auto)),
    }
    later = "nothing is lost; once MLflow answers, run the same command again to finish logging and registration"
    with mlflow_run(config, tags, folder, flatten(config), parent=parent, advice=later) as tracker:
        log_data(tracker, spec)
        if not parent:
            tracker.watch_system()
        yield tracker


def log_data(tracker: Tracker, spec: TrainSpec) -> None:
    sources = {
        "training": (spec.train, spec.config.data.train),
        "evaluation": (spec.eval, spec.config.data.eval),
    }
    for context, (store, named) in sources.items():
        if store is not None and store.complete:  # an incomplete store is logged after training
            paths = ", ".join(source.path for source in named) or "held out from training"
            tracker.dataset(context, store.digest, paths, store.manifest.rows, context)


# The results of a finished run, and the registration of its version.


def log_scores(
    exported: Exported, tracker: Tracker, answers: Sequence[Sample], scores: Scores
) -> None:
    """Log scores and samples; safe to repeat. Raises TrackingUnavailable if MLflow does not answer."""
    for step, when in ((exported.state.step, "after"), (0, "before")):
        tracker.metrics(
            {step: {f"score/{name}": value for name, value in scores.get(when, {}).items()}}
        )
    columns = ("prompt", "reference", "before", "after")
    tracker.table("samples", columns, [astuple(item) for item in answers])


def publish(
    exported: Exported, tracker: Tracker, tags: Mapping[str, str], scores: Scores
) -> dict[str, Any]:
    """Register a run and log its results; return the content of result.json. Safe to repeat.

    Raises TrackingUnavailable if MLflow does not answer; then do not write result.json, so that a retry logs the rest.
    """
    version = register(exported, tracker, tags, scores)
    spec = exported.spec
    state = exported.state
    last: dict[str, float] = {}
    for row in state.history:
        last |= row
    # The last evaluation may be of a worse adapter than the exported one.
    last |= exported.best_row
    last.pop("step", None)
    registered = None
    if version is not None:
        registry = spec.config.registry
        registered = {"model": registry.model, "version": version, "alias": registry.alias}
    content = {
        "run": spec.config.run.name,
        "steps": state.step,
        "automatic_lr": state.lr,
        "stopped_early": exported.result.stopped_early,
        "best_step": exported.step,
        "metrics": last,
        "eval_loss_before": next(iter(exported.losses()), None),
        "scores": scores,
        "base": spec.base.to_json(),
        "data": {"train": spec.train.digest, "eval": spec.eval.digest if spec.eval else None},
        "self_test": exported.result.self_test,
        "parity": exported.parity,
        "mlflow": {"uri": client.shown_uri(tracker.uri), "run_id": tracker.run_id},
        "registered": registered,
    }
    tracker.text(json.dumps(content, indent=2) + "\n", "result.json")
    return content


def register(
    exported: Exported, tracker: Tracker, tags: Mapping[str, str], scores: Scores | None = None
) -> int | None:
    """Log missing metrics, the parity report and the model; register the model if registry.model is set.

    `tags` override the version's own tags. Returns the version. Safe to repeat; raises TrackingUnavailable if MLflow
    does not answer.
    """
    spec = exported.spec
    state = exported.state
    config = spec.config
    registry = config.registry
    tracker.metrics(by_step(state.history))
    log_data(tracker, spec)
    tracker.text(json.dumps(exported.parity, indent=2), "parity.json")
    made_of = Fingerprint(
        spec.base.digest,
        spec.train.digest,
        spec.eval.digest if spec.eval else "",
        settings_digest(config),
    )
    folder = exported.folder
    own: dict[str, object] = {
        **made_of.tags(),
        **checksums.origin_tags(folder.root, spec.base.shown(), folder.used()),
        "olora.method": config.adapter.method,
        "olora.rank": config.adapter.rank,
        "olora.automatic_lr": "" if state.lr is None else f"{state.lr:g}",
        "olora.eval_loss": "" if exported.best_loss is None else f"{exported.best_loss:.6f}",
        "olora.eval_loss_before": "".join(f"{loss:.6f}" for loss in exported.losses()[:1]),
        "olora.score": main_score({"scores": scores or {}, "metrics": exported.best_row}),
        **tags,
    }
    content = "merged model" if config.export.merged else "adapter, without its base model,"
    with (
        contents_of(exported, scores or {}) as contents,
        tracker.reachable(upload=True),
    ):
        if registry.model is None:
            logger.info(f"logging the {content}")
            models.log_model(tracker, contents, own)
            return None
        logger.info(f"registering the {content} as {registry.model}@{registry.alias}")
        return models.register(
            tracker,
            contents,
            registry.model,
            registry.alias,
            own,
            key=registry.key,
            verify=registry.verify,
        )


# The push of the exports to the Hugging Face hub.


_STALE = ["adapter_*", "model*.safetensors*"]
"""Files of an earlier push that would be loaded beside the new ones: an adapter's, or weights in more parts."""


def check_name(repo: str, field: str) -> None:
    """Raise UserError if `repo` is no name of a repository, ORG/NAME."""
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    with as_user_error(f"{field}: {repo}", Exception):
        validate_repo_id(repo)
    if "/" not in repo:
        raise UserError(f"{field}: {repo}: expected ORG/NAME")


def check_hub(repo: str, field: str = "export.push") -> None:
    """Raise UserError if the hub's token here is known not to write to `repo`, TryAgain if there is no answer."""
    from huggingface_hub import HfApi

    check_name(repo, field)
    with as_user_error(f"{field}: {repo}", Exception, reason=_hub_problem, passes=is_temporary):
        user = HfApi().whoami()
    # A fine-grained token may not see all organisations, and another hub may answer less; the push itself decides then.
    role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
    places = [user, *(each for each in user.get("orgs") or () if each.get("roleInOrg") != "read")]
    owners = [str(each.get("name")) for each in places]
    if role == "read":
        raise UserError(
            f"{field}: {repo}: the hub's token here may only read; set HF_TOKEN to one that may write"
        )
    if role == "write" and repo.partition("/")[0] not in owners:
        raise UserError(
            f"{field}: {repo}: the hub's token here writes only for {', '.join(owners)}; set HF_TOKEN"
        )


def check_license(config: Config, base: BaseModel) -> None:
    """Raise UserError if the model cards of a push would name no license."""
    if config.export.push and not license_of(config, base):
        raise UserError(
            f"export.license: the files of {base.name} have no model card that names a license; set it, for example"
            " export.license=apache-2.0"
        )


# Tag of a registered model: what export.push had last, `ORG/NAME version N`.
PUSHED = "olora.pushed"


def push(config: Config) -> None:
    """Push the config's finished run to export.push, unless that is done; raise UserError and TryAgain as `upload`."""
    repo = config.export.push
    if not repo:
        return
    folder = RunFolder(config.folder())
    result = folder.state().finished(config)
    if result and result.get("pushed") != repo:
        is_merged = storage.exists(storage.join(folder.merged, "config.json"))
        with node_cache.fetched(folder.merged if is_merged else folder.adapter) as files:
            _upload(config, repo, files, f"run {config.run.name}")
        folder.write_result({**result, "pushed": repo})


def push_version(config: Config, number: str) -> None:
    """Push a registered version's own files to export.push, unless they were the last push.

    Raises UserError for a file that is not as it was registered, and as `upload`.
    """
    name = str(config.registry.model)
    what = f"version {number}"
    last = Aliases.of(config).tags().get(PUSHED)
    repo = config.export.push
    if repo and last != f"{repo} {what}":
        # Not the files of its run folder: another training may have written there since, or it was deleted.
        found = models.of_config(with_model(config, f"models:/{name}/{number}"))
        if found is None or not found.version.checksum:
            raise UserError(
                f"export.push: {name} {what} has no checksums, so its files are not pushed; delete export.push"
            )
        _upload(config, repo, found.folder, what)


def _upload(config: Config, repo: str, files: Path, what: str) -> None:
    # After a crash in the upload, nobody knows what the repository has.
    _note_push(config, f"{repo} unfinished")
    subject = f"export.push: {repo}: {what} is not pushed; the same command only pushes"
    upload(repo, files, f"{config.registry.model or ''} {what}", subject)
    _note_push(config, f"{repo} {what}")


def upload(repo: str, files: Path, what: str, subject: str, private: bool = True) -> str:
    """Upload a merged model or an adapter, and return the address of the commit; the hub skips files that it has.

    Raises UserError, which begins with `subject`, if the hub refuses it, and TryAgain if the hub does not answer.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    logger.info(f"pushing {what} to {repo}")
    with as_user_error(subject, Exception, reason=_hub_problem, passes=is_temporary):
        hub.create_repo(repo, private=private, exist_ok=True)
        done = hub.upload_folder(
            repo_id=repo,
            folder_path=files,
            commit_message=f"olora_ray: {what}",
            delete_patterns=_STALE,
        )
    logger.info(f"pushed: {done.commit_url}")
    return str(done.commit_url)


def _note_push(config: Config, state: str) -> None:
    if config.registry.model is None:
        return
    aliases = Aliases.of(config)
    # A run may have been registered elsewhere, or not at all; then no retraining reads the tag.
    if aliases.exists():
        aliases.tag(PUSHED, state)


def _hub_problem(error: BaseException) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalTokenNotFoundError):
        return "there is no token; set HF_TOKEN to one that may write, or run `hf auth login`"
    said = " ".join((getattr(error, "server_message", None) or first_line(error)).split())
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"the hub refuses it ({said}); set HF_TOKEN to one that may write"
    return said
