"""Makes one of a run's processes die, fail or stand still at a chosen point, once over all processes and attempts.

OLORA_FAULT="phase=step;step=5;rank=1;kind=kill;dir=/tmp/x" in the environment of the driver reaches all processes
of a local Ray. `kind` is kill (SIGKILL of the process that gets there), raise (a RuntimeError) or hold (it waits
until the file `release` appears in dir). Who comes first claims the file `marker` in dir and writes there who
he is. What of the product is not there to be patched is written to the file `missing`.

Every initialisation and every step that worker 0 has done is a line of the file `done`: the log may miss the last
second before the driver dies.
"""

import functools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

FAULT = dict(part.split("=", 1) for part in os.environ.get("OLORA_FAULT", "").split(";") if part)
HOLD_SECONDS = 180.0

_worker: Any = None
"""This process's training worker, to ask for rank and step."""
_saving = threading.local()
"""The step of the checkpoint that this thread writes, and how many of its files were begun."""


def install() -> None:
    """Patch the product's modules from now on, each when it is imported."""
    sys.meta_path.insert(0, _Finder())


def reached(phase: str, step: int | None = None, rank: int | None = None) -> None:
    """Act if this is the chosen point and nobody has acted yet."""
    if phase != FAULT["phase"]:
        return
    if any(name in FAULT and int(FAULT[name]) != value for name, value in (("step", step), ("rank", rank))):
        return
    if not _claimed({"pid": os.getpid(), "phase": phase, "step": step, "rank": rank}):
        return
    if FAULT["kind"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif FAULT["kind"] == "raise":
        raise RuntimeError("injected")
    else:
        _hold()


def _note(what: str) -> None:
    with (Path(FAULT["dir"]) / "done").open("a") as file:
        file.write(f"{what}\n")


def _claimed(who: dict[str, Any]) -> bool:
    own = Path(FAULT["dir"]) / f"claim-{os.getpid()}-{threading.get_ident()}"
    own.write_text(json.dumps(who))
    try:
        os.link(own, Path(FAULT["dir"]) / "marker")  # a reader never sees half of it
        return True
    except FileExistsError:
        return False
    finally:
        own.unlink()


def _hold() -> None:
    end = time.monotonic() + HOLD_SECONDS
    while time.monotonic() < end and not (Path(FAULT["dir"]) / "release").exists():
        time.sleep(0.02)


def _replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    old = getattr(owner, name, None)
    if old is None:
        (Path(FAULT["dir"]) / "missing").write_text(f"{owner.__name__}.{name}")
        return
    new = make(old)
    setattr(owner, name, functools.wraps(old)(new) if callable(old) else new)


def _patch_plan(module: ModuleType) -> None:
    _replace(module, "SHARD_ROWS", lambda _: (20, 32768))  # several shards of a small corpus


def _patch_writer(module: ModuleType) -> None:
    if FAULT["phase"] == "shard":
        _replace(module, "MAKE_HERE", lambda old: 0 * old)  # in tasks of Ray Data

    def make(old: Any) -> Any:
        def make_shard(job: Any, number: int) -> Any:
            if number:
                reached("shard", number)
            return old(job, number)

        return make_shard

    _replace(module, "make_shard", make)


def _patch_worker(module: ModuleType) -> None:
    def remember(old: Any) -> Any:
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            global _worker
            old(self, *args, **kwargs)
            _worker = self

        return init

    def initialise(old: Any) -> Any:
        def initialised(*args: Any, **kwargs: Any) -> Any:
            result = old(*args, **kwargs)
            if _worker.rank == 0:
                _note("initialisation")
            reached("initialise", rank=_worker.rank)
            return result

        return initialised

    def evaluate(old: Any) -> Any:
        def evaluated(*args: Any, **kwargs: Any) -> Any:
            reached("evaluate", _worker.state.step, _worker.rank)
            return old(*args, **kwargs)

        return evaluated

    def tell(old: Any) -> Any:
        def told(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = old(self, *args, **kwargs)
            if self.rank == 0 and self.state.step:
                _note(f"step {self.state.step}")
            time.sleep(float(FAULT.get("pace", 0)))
            reached("step", self.state.step, self.rank)
            return result

        return told

    _replace(module.Worker, "__init__", remember)
    _replace(module, "initialise", initialise)
    _replace(module, "evaluate", evaluate)
    _replace(module.Worker, "_tell", tell)


def _patch_checkpoint(module: ModuleType) -> None:
    def save(old: Any) -> Any:
        def saved(*args: Any, **kwargs: Any) -> Any:
            _saving.step = next(_steps([*args, *kwargs.values()]), None)
            _saving.files = 0
            return old(*args, **kwargs)

        return saved

    def save_file(old: Any) -> Any:
        def file_saved(*args: Any, **kwargs: Any) -> Any:
            _saving.files += 1
            if _saving.files == 2:
                reached("checkpoint", _saving.step)
            return old(*args, **kwargs)

        return file_saved

    _replace(module, "save", save)
    _replace(module, "save_file", save_file)


def _steps(values: list[Any]) -> Iterator[int]:
    for value in values:
        state = getattr(value, "state", value)
        if hasattr(state, "step"):
            yield int(state.step)


def _patch_export(module: ModuleType) -> None:
    def make(old: Any) -> Any:
        def added(*args: Any, **kwargs: Any) -> Any:
            reached("export")
            return old(*args, **kwargs)

        return added

    _replace(module, "_add", make)  # write_merged is under way: the base is copied, nothing is merged


def _patch_mlflow(module: ModuleType) -> None:
    def make(old: Any) -> Any:
        def created(*args: Any, **kwargs: Any) -> Any:
            version = old(*args, **kwargs)
            reached("register")
            return version

        return created

    _replace(module.MlflowClient, "create_model_version", make)


PATCHES = {
    "olora_ray.tokens.plan": _patch_plan,
    "olora_ray.tokens.writer": _patch_writer,
    "olora_ray.cluster.worker": _patch_worker,
    "olora_ray.train.checkpoint": _patch_checkpoint,
    "olora_ray.adapter.export": _patch_export,
    "mlflow.tracking.client": _patch_mlflow,
}


class _Finder:
    """Finds what the others find, and patches it once it has run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in PATCHES:
            return None
        others: list[Any] = [finder for finder in sys.meta_path if finder is not self]
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None:
            loader: Any = spec.loader
            loader.exec_module = functools.partial(_execute, loader.exec_module, PATCHES[name])
        return spec


def _execute(run: Callable[[ModuleType], None], patch: Callable[[ModuleType], None], module: ModuleType) -> None:
    run(module)
    patch(module)
