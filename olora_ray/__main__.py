"""Fine-tune a language model with OLoRA on a Ray cluster, try it, register it, and retrain it.

    olora-ray COMMAND [ARGUMENTS ...]

Commands, in the order of use:
"""

import importlib
import sys
from collections.abc import Callable
from difflib import get_close_matches

from olora_ray.calls.script import script
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
    "look": (
        "say whether a run is better, by how much, and where it is wrong: a page in one file",
        "olora_ray.pipeline.look",
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
    "export": (
        "write a run or a version into a folder: adapter, merged, gguf, for Ollama",
        "olora_ray.evaluation.export",
    ),
    "push": (
        "upload a run or a version to the Hugging Face hub; --dry-run sends nothing",
        "olora_ray.evaluation.push",
    ),
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

MEANT = {
    "merge": "export RUN --to FOLDER --form merged",
    "gguf": "export RUN --to FOLDER --form gguf",
    "ollama": "export RUN --to FOLDER --form ollama",
    "convert": "export RUN --to FOLDER --form gguf",
    "upload": "push RUN ORG/NAME",
    "publish": "push RUN ORG/NAME",
    "serve": "export RUN --to FOLDER, and an engine (docs/serving.md), or follow NAME@ALIAS",
}
"""Words of other tools -> what does it here."""


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
        if name in MEANT:
            hint = f"use olora-ray {MEANT[name]}"
        elif near:
            hint = f"did you mean {near[0]}?"
        raise UserError(f"argument {name}: unknown command; {hint}")


def _command(name: str) -> Callable[[list[str]], object]:
    place = COMMANDS[name][1]
    if place:
        return importlib.import_module(place).main  # type: ignore[no-any-return]
    # As Python does for a script: scorers are found there.
    sys.path.insert(0, str(command_line.ROOT / "pipelines"))
    module = script(name)
    module.__doc__ = (module.__doc__ or "").replace(
        f"python pipelines/{name}.py", f"olora-ray {name}"
    )
    return module.main  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
