"""List the runs, searches and comparisons of a storage, or show what one
decided. Writes and starts nothing.

    olora-ray runs [STORAGE]        a folder or URI as in run.storage; the
                                    default is ./runs
    olora-ray runs show RUN         its name in ./runs, or its folder: each
                                    field that was decided (decided.json), set
                                    or measured, with its value, and why

Each line of the list has the name, the state, the held-out loss before > after
training, the lowest of the scorer's means (of preference pairs the share
preferred), the time of the last change, the registered version, the steps done
/ all steps, the data, and the base model. The newest line is the last. On a
terminal, long cells are shortened and the last columns left out. Until a run
that is trained longer ends, its numbers are those of the shorter training.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from olora_ray.common import lock, storage
from olora_ray.common.errors import UserError, as_user_error, short_reason
from olora_ray.common.text import minute, paragraph, table
from olora_ray.config import command_line
from olora_ray.config.load import leaves
from olora_ray.config.schema import IN_STORAGE, Config
from olora_ray.pipeline.run_folder import RunFolder, main_score, named, read_decisions

HEAD = ("name", "state", "loss", "score", "changed", "version", "steps", "data", "model")
KINDS = {
    "search.json": "search",
    "compare.json": "comparison",
    "config.yaml": "run",
    "checkpoints": "run",
}
"""File or folder -> type of the folder that contains it."""
ENDS = {"search": "best.yaml", "comparison": "comparison.json", "run": "result.json"}
"""Type of folder -> its last file, which marks it as finished."""
EARLIER = "earlier.json"
"""The last result of a run that is trained longer."""


def main(argv: list[str]) -> None:
    arguments = command_line.parse(argv, usage=__doc__ or "").words
    if arguments[:1] == ("show",):
        show(arguments[1:])
        return
    if len(arguments) > 1:
        raise UserError(f"arguments {' '.join(arguments)}: name one storage")
    storage_root = command_line.absolute(arguments[0] if arguments else "runs", Path.cwd())
    with as_user_error(f"{storage_root}: cannot be read", OSError, reason=short_reason):
        rows = listed(storage_root)
    if rows:
        print(table([HEAD, *rows]))
    elif arguments:
        raise UserError(f"{storage_root}: has no runs; name the folder or URI of run.storage")
    else:
        print(f"no runs in {storage_root}")


def show(arguments: Sequence[str]) -> None:
    """Print what a run or search has decided, and why."""
    if len(arguments) != 1:
        raise UserError(f"arguments show {' '.join(arguments)}: name one run")
    place = named(arguments[0])
    with as_user_error(f"{place}: cannot be read", OSError, reason=short_reason):
        decisions = read_decisions(place)
        state = RunFolder(place).state()
    result = state.result or {}
    rows = [
        ("eval/loss", _losses(result), "held-out rows, before > after training"),
        (
            "score",
            main_score(result) or "-",
            "the lowest of the scorer's means, or pairs preferred",
        ),
    ]
    for field, decision in decisions.items():
        rows.append((field, json.dumps(decision.value), decision.why))
    measured = {
        "model.dtype": state.precision,
        "model.attention": result.get("self_test", {}).get("attention"),
        "train.lr": result.get("automatic_lr"),
    }
    for field, value in _set(state.config).items():
        measured.pop(field, None)
        if not field.startswith(tuple(decisions)):
            rows.append((field, json.dumps(value), "set in the config"))
    for field, value in measured.items():
        if value is not None:
            rows.append((field, json.dumps(value), "the workers measured it"))
    for field, shown, why in rows:
        print(paragraph(f"{field} = {shown}: {why}", 4))


def _set(config: Config | None) -> dict[str, Any]:
    if config is None:
        return {}
    return dict(leaves(config.model_dump(mode="json", exclude_defaults=True), ""))


def listed(storage_root: str) -> list[tuple[str, ...]]:
    """Return the cells of HEAD for each run, search and comparison, the newest last."""
    names = [
        name
        for name in storage.names(storage_root)
        if name not in IN_STORAGE and not name.startswith(".")
    ]
    with ThreadPoolExecutor(16) as pool:  # each run needs several requests to an object store
        rows = sorted(filter(None, pool.map(partial(_row, storage_root), names)))
    return [cells for _, cells in rows]


def _row(root: str, name: str) -> tuple[float, tuple[str, ...]] | None:
    """Return (time of the last change, cells), or None if the folder is no run, search or comparison."""
    folder = storage.join(root, name)
    try:
        times = storage.times(folder)
    except NotADirectoryError:
        return None
    folder_type = next((folder_type for file, folder_type in KINDS.items() if file in times), None)
    if folder_type is None:
        return None
    changed = max(times.values())
    # A lock alone does not mean "running": a killed driver leaves its lock behind, and is_held checks the holder.
    if ENDS[folder_type] in times:
        state = "finished"
    elif lock.is_held(storage.join(root, "locks", "runs", f"{name}.json")):
        state = "running"
    else:
        state = "interrupted"
    cells = [f"{folder_type}, {state}"]
    if folder_type == "run":
        cells = _of_run(folder, state, EARLIER in times)
    cells += ["-"] * (len(HEAD) - 2 - len(cells))
    state, loss, score, *others = cells
    return changed, (name, state, loss, score, minute(changed), *others)


def _of_run(folder: str, state: str, longer: bool) -> list[str]:
    """Return the cells from state to model without the time, or only `damaged: FILE` if a file cannot be read.

    `longer`: the run had finished before it was trained longer, and its folder has the result of that time.
    """
    finished = state == "finished"
    file = "config.yaml"
    try:
        text = storage.read_text(storage.join(folder, file))
        # Not `load_config`, which is ten times slower: a storage may have thousands of runs.
        config: Any = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 - both are
        train = config["train"]
        length = f"/{train['steps']}" if train["steps"] else f" ({train['epochs']:g} epochs)"
        model = _last(config["model"]["name"])
        first, *more = config["data"]["train"]
        data = _last(first["path"])
        if more:
            data += f" +{len(more)}"
        if config["registry"]["alias"] == "challenger":
            state = f"retraining, {state}"
        file = ENDS["run"] if finished else EARLIER
        result = {}
        if finished or longer:
            result = json.loads(storage.read_text(storage.join(folder, file)))
        loss = _losses(result)
        score = main_score(result) or "-"
        version = "-"
        made = result.get("registered")
        if made:
            version = f"{made['model']}/{made['version']}"
        done = 0
        if finished:
            done = result.get("steps") or 0
            if result.get("stopped_early"):
                state += " early"
        if not done:
            names = storage.names(storage.join(folder, "checkpoints"))
            done = max((int(each[5:]) for each in names if each[5:].isdecimal()), default=0)
    except Exception:  # another program may have written anything here
        return [f"damaged: {file}"]
    return [state, loss, score, version, f"{done}{length}", data, model]


def _losses(result: Mapping[str, Any]) -> str:
    losses = (result.get("eval_loss_before"), result.get("metrics", {}).get("eval/loss"))
    return " > ".join("-" if loss is None else f"{loss:.4f}" for loss in losses)


def _last(path: str) -> str:
    if path.startswith("/"):
        return path.rpartition("/")[2]
    return path
