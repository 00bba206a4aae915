"""Fine-tune a language model with OLoRA on Ray, try it, register it, retrain it.

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
    "quickstart": ("finetune a small model with rows of its own, in some minutes", None),
    "init": ("write a config for your rows: format, held-out rows, length, model", None),
    "finetune": ("train an adapter, check it, register it; --dry-run: only the plan", None),
    "chat": (
        "send a prompt to the base model and to the fine-tuned model",
        "olora_ray.evaluation.chat",
    ),
    "look": (
        "write a page that says if a run is better, how much, where wrong",
        "olora_ray.pipeline.look",
    ),
    "runs": (
        "list all runs of a storage, or show what a run decided and why",
        "olora_ray.pipeline.runs",
    ),
    "evaluate": ("measure one or two models on held-out rows, tasks of lm-eval", None),
    "sweep": ("search rank, alpha, learning rate and other settings", None),
    "compare": ("compare adapters on your data, each at its own learning rate", None),
    "registry": ("list registered versions, and set the champion by hand", None),
    "retrain": ("every night: train if something is new, promote what is better", None),
    "nights": ("say how a model's nights went: champion, last good one, refusals", None),
    "export": (
        "write a model into a folder: adapter, merged, gguf, for Ollama",
        "olora_ray.evaluation.export",
    ),
    "push": (
        "upload a model to the Hugging Face hub; --dry-run sends nothing",
        "olora_ray.evaluation.push",
    ),
    "prune": (
        "delete old runs, token stores and copies of models in a storage",
        "olora_ray.pipeline.prune",
    ),
    "follow": (
        "let vLLM, SGLang or Ray Serve answer with the current champion",
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
        print("olora-ray COMMAND --help explains one; olora-ray --version prints the release.")
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
