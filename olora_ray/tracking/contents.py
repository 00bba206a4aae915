"""Contents of a version: which folder is registered, and what is said of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ADAPTER_ONLY = "adapter only"
"""Value of the tag EXPORT of a version that needs its base model to be loaded."""
EXPORT = "olora.export"
MODEL_PLACE, ADAPTER_PLACE = "model", "peft"
"""Where a merged model and an adapter lie in a logged model; MLflow's own names."""


@dataclass(frozen=True)
class BaseOfAdapter:
    """The base model that an adapter-only version stands on, as the version keeps it."""

    name: str
    """As a config names it: hub id, path, package://, s3://, models:/NAME/VERSION."""
    digest: str
    """Of all its files that decide what it computes (model/identity.py)."""
    folder: str
    """Where it lies on the machines of this cluster."""
    revision: str | None = None
    """Of a hub id: the commit."""
    on_hub: bool = False
    """Whether the name is a hub id under which anybody finds the model and the adapter's own tokenizer."""


@dataclass(frozen=True)
class Contents:
    """What is logged as one model."""

    folder: Path
    """A merged model, or an adapter in PEFT's form with tokenizer."""
    base: BaseOfAdapter | None = None
    """Of an adapter; None: the folder is a merged model."""
    answers_as: str = ""
    """What the model's answers name as their model when it is served."""
    description: str = ""
    """Markdown for the page of the version, or of the logged model; {uri} stands for its models:/ address."""
    example: Mapping[str, Any] | None = None
    """Input example: a request to the served model; None: one that says hello."""

    @property
    def name(self) -> str:
        """Name of the logged model in its run."""
        return "merged" if self.base is None else "adapter"

    @property
    def place(self) -> str:
        """Where the folder lies in the logged model."""
        return MODEL_PLACE if self.base is None else ADAPTER_PLACE
