"""The entry scripts as modules: the command line and the functions of the package run the same bodies."""

import functools
import importlib.util
from types import ModuleType

from olora_ray.config import command_line


@functools.cache
def script(name: str) -> ModuleType:
    """Return the script of a command, from pipelines/ or a pipelines/contrib/NAME/.

    The scripts are no modules of the package: `python pipelines/finetune.py` runs the same files.
    """
    folder = command_line.ROOT / "pipelines"
    file = folder / f"{name}.py"
    if not file.is_file():
        file = next(folder.glob(f"contrib/*/{name}.py"))
    spec = importlib.util.spec_from_file_location(f"olora_ray_{name}", file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
