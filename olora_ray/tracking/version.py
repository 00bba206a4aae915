"""A version of a registered model, as the rest of the project sees it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from olora_ray.common.errors import UserError
from olora_ray.tracking import record

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


def name_filter(name: str) -> str:
    """MLflow's filter for the versions of a model; raises UserError for a name that MLflow cannot have."""
    if not name.strip() or "/" in name or ":" in name or ("'" in name and '"' in name):
        raise UserError(f"{name!r} is no name of a registered model: MLflow has none with '/' or ':', or both quotes")
    return f'name = "{name}"' if "'" in name else f"name = '{name}'"


@dataclass(frozen=True)
class Version:
    """One version, with its tags as they were when it was read, and the entries of its record among them."""

    name: str
    """Of the registered model."""
    number: str
    tags: Mapping[str, str]
    run_id: str | None = None
    """The MLflow run that registered it."""
    created: float = 0.0
    """Seconds since 1970."""

    @classmethod
    def of(cls, found: "ModelVersion") -> "Version":
        """MLflow's version as ours."""
        seconds = (found.creation_timestamp or 0) / 1000
        return cls(found.name, str(found.version), record.unfolded(found.tags), found.run_id, seconds)
