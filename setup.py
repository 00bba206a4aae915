"""What pyproject.toml cannot say: a wheel carries the commands of pipelines/ and the files that they name.

They lie in olora_ray/shipped/, where `olora-ray` finds them without a checkout. Package data cannot come from outside
of a package, and packages called pipelines and tune_spaces would take these names from their users.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = (
    *("pipelines/*.py", "pipelines/other_tools.yaml"),
    *("pipelines/configs/quickstart.yaml", "pipelines/quickstart/*.jsonl"),
    "pipelines/recipes/*/[!_]*.*",
    *("pipelines/contrib/**/*.py", "pipelines/contrib/**/*.yaml"),
    *("tune_spaces/*.yaml", "docs/generated/*.json"),
)


class WithCommands(build_py):
    """Copies the files beside the package's own; an editable installation has them in the checkout."""

    def run(self) -> None:
        """Build the package, and put the files into it."""
        super().run()
        for file in () if self.editable_mode else self._shipped():
            target = Path(self.build_lib, "olora_ray", "shipped", file)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)

    def get_source_files(self) -> list[str]:
        """Return what a source distribution holds."""
        return [*super().get_source_files(), *map(str, self._shipped())]

    def _shipped(self) -> list[Path]:
        return [file for pattern in SHIPPED for file in Path().glob(pattern)]


setup(cmdclass={"build_py": WithCommands})
