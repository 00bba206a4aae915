"""The open tables: which formats, methods, objectives, optimizers and exporters there are, by name.

A member is one object in a module of its own, and one line in the index below. The index holds texts, so that a config
is validated, and `--help` printed, without importing any member.

An installed package adds members with entry points. In its pyproject.toml:

    [project.entry-points."olora_ray.formats"]
    dialogs = "my_rows:FORMAT"

Then `format: dialogs` works where the package is installed. A config cannot name a Python path instead: configs also
come from buckets and checkpoints, and reading one must not decide what is imported.
"""

import difflib
import hashlib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from olora_ray.common.errors import UserError

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Plugin:
    """A member of an installed package."""

    name: str
    package: str
    version: str
    digest: str
    """SHA-256 of the package's Python files, or of its one module."""

    def identity(self) -> str:
        """Return what decides what the member makes, for digests."""
        return f"{self.package} {self.version} {self.digest}"


ELSEWHERE = {
    "qlora": "of QLoRA's parts, set model.quantization=nf4, and leave this field at olora or lora",
    "rslora": "set adapter.rank_stabilized=true",
}
"""Methods of other tools that are another field here -> what to do."""


@dataclass(frozen=True, eq=False)
class Table:
    group: str
    """Name of the entry points with which installed packages add members."""
    own: Mapping[str, str]
    """Name of each member of this package -> module:object."""

    def names(self) -> tuple[str, ...]:
        """Return the names of this package, then those of installed packages; nothing is imported."""
        installed = {entry.name: None for entry in metadata.entry_points(group=self.group)}
        return tuple(dict.fromkeys([*self.own, *installed]))

    def knows(self, name: str) -> bool:
        return name in self.own or name in self.names()

    def load(self, name: str, kind: type[Kind]) -> Kind:
        """Import a member; raise UserError if there is none, or if its package is broken."""
        if name in self.own:
            member = _imported(self.own[name])
        else:
            entry = self._entry(name)
            try:
                member = _imported(entry.value)
            except Exception as error:
                raise UserError(
                    f"{self._said(entry)} cannot be imported: {type(error).__name__}: {error}; repair the package"
                ) from error
            if not isinstance(member, kind):
                raise UserError(
                    f"{self._said(entry)} is a {type(member).__name__}, not a {kind.__name__}; repair the package"
                )
        assert isinstance(member, kind)
        return member

    def plugin(self, name: str) -> Plugin | None:
        """Return the package of a member, without importing it; None for a member of this package."""
        if name in self.own:
            return None
        entry = self._entry(name)
        assert entry.dist is not None
        # The outermost part with code. Parts above it are namespaces, which packages share and which run no code.
        module, *inner = entry.module.split(".")
        spec = find_spec(module)
        while spec is not None and spec.origin is None and inner:
            module = f"{module}.{inner.pop(0)}"
            spec = find_spec(module)
        if spec is None:
            raise UserError(f"{self._said(entry)} has no module {entry.module}; repair the package")
        return Plugin(name, entry.dist.name, entry.dist.version, _digest(spec))

    def identity(self, name: str) -> str:
        """Return what decides the numbers that a member computes: its name, and the package that it comes from."""
        plugin = self.plugin(name)
        if plugin is None:
            return name
        return f"{name} of {plugin.package} {plugin.version} {plugin.digest[:16]}"

    def _entry(self, name: str) -> metadata.EntryPoint:
        found: list[metadata.EntryPoint] = [*metadata.entry_points(group=self.group, name=name)]
        if not found:
            raise UserError(self.unknown(name))
        if len(found) > 1:
            packages = " and ".join(sorted(entry.dist.name for entry in found if entry.dist))
            raise UserError(f"{self.group}: {packages} both have {name!r}; uninstall one of them")
        return found[0]

    def _said(self, entry: metadata.EntryPoint) -> str:
        assert entry.dist is not None
        package = f"{entry.dist.name} {entry.dist.version}"
        return f"{self.group}: {entry.name!r} of package {package} ({entry.value})"

    def unknown(self, name: str, also: tuple[str, ...] = ()) -> str:
        """Return a message about a name without a member; `also` are other words that the setting accepts."""
        known = [*also, *self.names()]
        *most, last = [repr(each) for each in known]
        message = f"input should be {', '.join(most)} or {last}"
        if name in ELSEWHERE:
            return f"{message}; {ELSEWHERE[name]}"
        near = difflib.get_close_matches(name, known, n=1)
        if near:
            return f"{message}; did you mean {near[0]!r}?"
        return f"{message}, or a name that an installed package adds (entry points {self.group})"


def _imported(place: str) -> object:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def _digest(spec: ModuleSpec) -> str:
    files = []
    for folder in spec.submodule_search_locations or ():
        for path in sorted(Path(folder).rglob("*.py")):
            files.append((path.relative_to(folder).as_posix(), path))
    if not spec.submodule_search_locations and spec.origin:
        files.append((Path(spec.origin).name, Path(spec.origin)))
    digest = hashlib.sha256()
    for name, path in files:
        content = path.read_bytes()
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


# The index. The order of the formats decides between readings of rows that are equally good.


FORMATS = Table(
    "olora_ray.formats",
    {
        "preference": "olora_ray.data.formats.preference:FORMAT",
        "rating": "olora_ray.data.formats.rating:FORMAT",
        "messages": "olora_ray.data.formats.messages:FORMAT",
        "sharegpt": "olora_ray.data.formats.sharegpt:FORMAT",
        "alpaca": "olora_ray.data.formats.alpaca:FORMAT",
        "prompt_completion": "olora_ray.data.formats.prompt_completion:FORMAT",
        "text": "olora_ray.data.formats.text:FORMAT",
        "tokens": "olora_ray.data.formats.tokens:FORMAT",
    },
)

METHODS = Table(
    "olora_ray.methods",
    {
        "olora": "olora_ray.adapter.methods.olora:METHOD",
        "lora": "olora_ray.adapter.methods.lora:METHOD",
        "pissa": "olora_ray.adapter.methods.pissa:METHOD",
        "milora": "olora_ray.adapter.methods.milora:METHOD",
        "orthogonal": "olora_ray.adapter.methods.orthogonal:METHOD",
        "nora": "olora_ray.adapter.methods.nora:METHOD",
        "eva": "olora_ray.adapter.methods.eva:METHOD",
    },
)

FORMS = ("adapter", "merged")
"""The exports of each run; EXPORTERS has further ones, which are made of these."""
EXPORTERS = Table(
    "olora_ray.exporters",
    {
        "gguf": "olora_ray.contrib.gguf:EXPORTER",
        "ollama": "olora_ray.contrib.ollama:EXPORTER",
    },
)

OBJECTIVES = Table(
    "olora_ray.objectives",
    {
        "tokens": "olora_ray.train.objectives.tokens:OBJECTIVE",
        "pairs": "olora_ray.train.objectives.pairs:OBJECTIVE",
    },
)

OPTIMIZERS = Table(
    "olora_ray.optimizers",
    {
        "adamw": "olora_ray.adapter.optimizers.adamw:OPTIMIZER",
        "preconditioned": "olora_ray.adapter.optimizers.preconditioned:OPTIMIZER",
        "spectral": "olora_ray.adapter.optimizers.spectral:OPTIMIZER",
    },
)
