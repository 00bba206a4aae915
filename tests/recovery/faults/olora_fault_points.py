"""Makes one of a run's processes die, fail or stand still at a chosen point, once over all processes and attempts.

OLORA_FAULT="phase=step;step=5;rank=1;kind=kill;dir=/tmp/x" in the environment of the driver reaches all processes
of a local Ray. `kind` is kill (SIGKILL of the process that gets there), raise (a RuntimeError), hold (it waits until
the file `release` appears in dir) or watch (what is done is noted, and nothing else changes). Who comes first claims
the file `marker` in dir and writes there who he is. The points are those of olora_ray.common.fault_points; a module
that lacks what is to be replaced here is named in the file `missing`.

Every initialisation and every step that worker 0 has done is a line of the file `done`, with the time and the process
(tests/recovery/moments.py reads it): the log may miss the last second before the driver dies.

While a run goes on, a file in dir changes what happens: `raise-PID` lets that process fail after its next step, and
with `hurry` steps take no longer than they need.
"""

import functools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

FAULT = dict(part.split("=", 1) for part in os.environ.get("OLORA_FAULT", "").split(";") if part)
HOLD_SECONDS = 180.0


def install() -> None:
    """Install the handler, and replace constants, when the product's modules are imported."""
    sys.meta_path.insert(0, _Finder())


def handle(point: str, step: int | None, rank: int | None) -> None:
    """The product's handler: note what worker 0 has done, draw out the steps, and act at the chosen point."""
    if point == "shard" and step == 0:
        return  # a preparation that is cut off shall leave a shard behind
    if point == "initialise" and rank == 0:
        _note("initialisation")
    if point == "step":
        if rank == 0 and step:
            _note(f"step {step}")
        _draw_out()
        _fail_if_asked()
    _act(point, step, rank)


def _act(phase: str, step: int | None, rank: int | None) -> None:
    """Act if this is the chosen point and nobody has acted yet."""
    if phase != FAULT["phase"]:
        return
    if any(
        name in FAULT and int(FAULT[name]) != value
        for name, value in (("step", step), ("rank", rank))
    ):
        return
    if not _claimed({"pid": os.getpid(), "phase": phase, "step": step, "rank": rank}):
        return
    if FAULT["kind"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif FAULT["kind"] == "raise":
        raise RuntimeError("injected")
    else:
        _hold()


def _draw_out() -> None:
    pace = float(FAULT.get("pace", 0))
    if pace and not (Path(FAULT["dir"]) / "hurry").exists():
        time.sleep(pace)


def _fail_if_asked() -> None:
    asked = Path(FAULT["dir"]) / f"raise-{os.getpid()}"
    if asked.exists():
        asked.unlink()
        raise RuntimeError("injected")


def _note(what: str) -> None:
    with (Path(FAULT["dir"]) / "done").open("a") as file:
        file.write(f"{what}\t{time.time():.3f}\t{os.getpid()}\n")


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


def _replace(owner: ModuleType, name: str, make: Callable[[Any], Any], *others: str) -> None:
    """Give a module another value of `name`; it must have the `others` too."""
    for wanted in (name, *others):
        if not hasattr(owner, wanted):
            (Path(FAULT["dir"]) / "missing").write_text(f"{owner.__name__}.{wanted}")
            return
    setattr(owner, name, make(getattr(owner, name)))


def _patch_fault_points(module: ModuleType) -> None:
    _replace(module, "handler", lambda _: handle, "reached")


def _patch_plan(module: ModuleType) -> None:
    if FAULT["kind"] != "watch":
        _replace(module, "SHARD_ROWS", lambda _: (20, 32768))  # several shards of a small corpus


def _patch_writer(module: ModuleType) -> None:
    if FAULT["phase"] == "shard":
        _replace(module, "MAKE_HERE", lambda old: 0 * old)  # in tasks of Ray Data


PATCHES = {
    "olora_ray.common.fault_points": _patch_fault_points,
    "olora_ray.tokens.plan": _patch_plan,
    "olora_ray.tokens.prepare": _patch_writer,
}


class _Finder:
    """Finds what the others find, and patches it once it has run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in PATCHES:
            return None
        others: list[Any] = [finder for finder in sys.meta_path if finder is not self]
        spec = next(
            (found for finder in others if (found := finder.find_spec(name, path, target))), None
        )
        if spec is not None:
            loader: Any = spec.loader
            loader.exec_module = functools.partial(_execute, loader.exec_module, PATCHES[name])
        return spec


def _execute(
    run: Callable[[ModuleType], None], patch: Callable[[ModuleType], None], module: ModuleType
) -> None:
    run(module)
    patch(module)
