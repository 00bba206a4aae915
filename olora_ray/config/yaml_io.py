"""YAML as configs are written: numbers such as 1e-4 are read, and texts that look like them are quoted."""

import re
from typing import Any

import yaml

from olora_ray.common.errors import UserError


class Loader(yaml.SafeLoader):
    """SafeLoader that also reads 1e-4 as a number (YAML 1.1 wants 1.0e-4)."""


class Dumper(yaml.SafeDumper):
    """SafeDumper that quotes a text which `Loader` would read as a number."""


for _kind in (Loader, Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:\d[\d_]*)(?:\.\d*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )


def parse_yaml(text: str, where: str) -> Any:
    """Read YAML; `where` names the text in the UserError that broken YAML raises."""
    try:
        return yaml.load(text, Loader=Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where}{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {error}") from None
