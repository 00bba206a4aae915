"""Specification of one phase of a comparison: a search whose trials have tokens by their seed.

<storage>/<name>/
    rows/                       the three sets of rows; see rows.py
    tuning-1/ tuning-2/ ...     phases, each a folder like that of a search, with trials/trial-007/
    final/
    shared/METHOD/              factors for the tuning, and how long they took
    shared/seed-18/             what the base model does on the test rows
    compare.json                what it was begun with
    comparison.json report.html *.png
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from olora_ray.cluster.spec import TrainSpec
from olora_ray.common import storage
from olora_ray.config.schema import Config
from olora_ray.sweep.spec import SweepSpec

FINAL = "final"
"""Name of the phase that is compared."""


def tuning_name(number: int) -> str:
    """Name of a round of the tuning, counted from 1."""
    return f"tuning-{number}"


def has_begun(root: str) -> bool:
    """Whether a comparison has trials: until then its settings and rows may still be changed."""
    return storage.exists(storage.join(root, tuning_name(1)))


def shared_place(root: str, method_or_seed: str) -> str:
    """A folder of what trials share; `root` is the comparison's."""
    return storage.join(root, "shared", method_or_seed)


@dataclass(frozen=True)
class PhaseSpec(SweepSpec):
    """Travels to every trial of a phase."""

    root: str = ""
    """Folder of the comparison; `folder` is that of the phase."""
    specs: Mapping[int, TrainSpec] = field(default_factory=dict)
    """run.seed -> specification with the tokens in the order of that seed."""

    def spec_of(self, config: Config) -> TrainSpec:
        """The specification of a trial.

        In the final phase a trial makes its factors itself, as a run would: they depend on the seed.
        """
        seed = config.run.seed
        name = config.adapter.method if self.folder != storage.join(self.root, FINAL) else f"seed-{seed}"
        return replace(self.specs[seed], config=config, shared=shared_place(self.root, name))

    def shares_data(self) -> bool:
        """The base model is the same for all, and so are the tokens of a seed."""
        return True
