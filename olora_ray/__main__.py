"""Fine-tune a language model with OLoRA on a Ray cluster, look at it, register it, keep it up to date.

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

COMMANDS = {
    "init": ("write a config for your rows: format, held-out rows, length, model", None),
    "finetune": ("train an adapter, check it, register it; with --dry-run show what would be done", None),
    "chat": ("put a prompt to the base and to the fine-tuned model", "olora_ray.evaluation.chat"),
    "runs": ("list the runs that there are, with steps, losses and versions", "olora_ray.pipeline.runs"),
    "evaluate": ("measure a model, or two side by side, on held-out rows and on tasks of lm-eval", None),
    "sweep": ("search rank, alpha, learning rate and other settings", None),
    "compare": ("compare methods of initialising an adapter on your data", None),
    "registry": ("list registered versions, move the champion by hand", None),
    "retrain": ("for a scheduler: train again if something has changed, promote what is better", None),
}
"""Command -> what it is for, and its module; None: the script of that name in pipelines/."""


def main() -> None:
    """Run the command that the command line names."""
    command_line.run(_main)


def _main(argv: list[str]) -> None:
    name, *rest = argv or ["--help"]
    if name in command_line.HELP:
        table = aligned([(f"  {command}", about) for command, (about, _) in COMMANDS.items()])
        print((__doc__ or "").strip(), *table, "", sep="\n")
        print("olora-ray COMMAND --help says more of each, olora-ray --version which release this is.")
    elif name == command_line.VERSION:
        command_line.parse(argv, usage="")
    elif name in COMMANDS:
        quiet_environment()  # before Ray is imported
        _command(name)(rest)
    else:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        raise UserError(f"argument {name}: no such command; {hint}")


def _command(name: str) -> Callable[[list[str]], None]:
    if module := COMMANDS[name][1]:
        return importlib.import_module(module).main  # type: ignore[no-any-return]
    folder = command_line.ROOT / "pipelines"
    sys.path.insert(0, str(folder))  # as Python does for a script there: compare.py imports what lies beside it
    spec = importlib.util.spec_from_file_location(f"olora_ray_{name}", folder / f"{name}.py")
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.__doc__ = (script.__doc__ or "").replace(f"python pipelines/{name}.py", f"olora-ray {name}")
    return script.main  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
