"""The training specification of one trial: that of the search, or with a base model and tokens of the trial's own."""

from olora_ray.cluster.spec import TrainSpec
from olora_ray.config.schema import Config
from olora_ray.pipeline.base import open_base
from olora_ray.pipeline.prepare import prepare_tokens
from olora_ray.sweep.spec import SweepSpec


def trial_spec(sweep_spec: SweepSpec, config: Config, cpus_held: float = 0.0) -> TrainSpec:
    """What a trial with this config trains; raises UserError as `open_base` and `prepare_tokens`.

    Where `model.*` or `data.*` are searched the tokens are made if they are not there, beside what others hold.
    """
    if sweep_spec.shares_data():
        return sweep_spec.spec_of(config)
    spec, _ = prepare_tokens(config, open_base(config), wait=True, cpus_held=cpus_held)
    return spec
