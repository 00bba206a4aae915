"""Fine-tune a language model with OLoRA on a Ray cluster, try it, register it, and retrain it.

    olora-ray COMMAND [ARGUMENTS ...]

Commands, in the order of use:
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from difflib import get_close_matches

from olora_ray.common.errors import UserError
from olora_ray.common.logs import quiet_environment
from olora_ray.common.text import aligned
from olora_ray.config import command_line

QUICKSTART = "pipelines/configs/quickstart.yaml"
COMMANDS = {
    "quickstart": (
        "finetune with the quickstart's own model and rows, in some minutes on any machine",
        None,
    ),
    "init": ("write a config for your rows: format, held-out rows, length, model", None),
    "finetune": (
        "train an adapter, check it and register it; --dry-run only prints the plan",
        None,
    ),
    "chat": (
        "send a prompt to the base model and to the fine-tuned model",
        "olora_ray.evaluation.chat",
    ),
    "runs": (
        "list all runs of a storage, or show what a run decided and why",
        "olora_ray.pipeline.runs",
    ),
    "evaluate": (
        "evaluate one model, or compare two, on held-out rows and on tasks of lm-eval",
        None,
    ),
    "sweep": ("search rank, alpha, learning rate and other settings", None),
    "compare": ("compare adapters on your data, each at its own learning rate", None),
    "registry": ("list registered versions, and set the champion by hand", None),
    "retrain": (
        "retrain if something has changed, and promote a better model; made for a scheduler",
        None,
    ),
    "nights": ("show how the nights of a model went: last good one, champion, refusals", None),
    "prune": (
        "delete old run folders, token stores and copies of models in a storage",
        "olora_ray.pipeline.prune",
    ),
    "follow": (
        "let vLLM, SGLang or Ray Serve answer with the champion when it changes",
        "olora_ray.serving.follow",
    ),
    "feedback": (
        "make training data of ratings and corrections of served answers",
        "olora_ray.serving.collect",
    ),
}
"""Command -> (description, module with its `main`); None: the script of that name, in pipelines/ or a contrib/NAME/."""


def main() -> None:
    command_line.run(_main)


def _main(argv: list[str]) -> None:
    name, *rest = argv or ["--help"]
    if name in command_line.HELP:
        table = aligned([(f"  {command}", about) for command, (about, _) in COMMANDS.items()])
        print((__doc__ or "").strip(), *table, "", sep="\n")
        print(
            "olora-ray COMMAND --help explains a command; olora-ray --version prints the release."
        )
    elif name == command_line.VERSION:
        command_line.parse(argv, usage="")
    elif name in COMMANDS:
        quiet_environment()  # Ray reads these variables when it is imported
        if name == "quickstart":
            name = "finetune"
            rest = [QUICKSTART, *rest]
        _command(name)(rest)
    else:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"use one of {', '.join(COMMANDS)}"
        if near:
            hint = f"did you mean {near[0]}?"
        raise UserError(f"argument {name}: unknown command; {hint}")


def _command(name: str) -> Callable[[list[str]], None]:
    module = COMMANDS[name][1]
    if module:
        return importlib.import_module(module).main  # type: ignore[no-any-return]
    # The scripts are no modules of the package: `python pipelines/finetune.py` runs the same files.
    folder = command_line.ROOT / "pipelines"
    sys.path.insert(0, str(folder))  # as Python does for a script: scorers are found there
    file = folder / f"{name}.py"
    if not file.is_file():
        file = next(folder.glob(f"contrib/*/{name}.py"))
    spec = importlib.util.spec_from_file_location(f"olora_ray_{name}", file)
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.__doc__ = (script.__doc__ or "").replace(
        f"python pipelines/{name}.py", f"olora-ray {name}"
    )
    return script.main  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
