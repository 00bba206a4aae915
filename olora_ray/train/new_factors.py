"""New factors for a training, by whichever way its method makes them: of the weights, or of the training data."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from olora_ray.adapter.factors import Factors
from olora_ray.adapter.initialise import InitReport, initialise, options_of
from olora_ray.adapter.layout import parameter_of
from olora_ray.adapter.methods import FROM_WEIGHTS, METHODS
from olora_ray.adapter.targets import Target
from olora_ray.config.schema import Config
from olora_ray.tokens.store import TokenStore
from olora_ray.train.data_driven import DataReport, eva_factors
from olora_ray.train.gradient_factors import gradient_factors
from olora_ray.train.loader import Waiting
from olora_ray.train.loss import SupervisedLoss


def new_factors(
    loss: SupervisedLoss,
    targets: Mapping[str, Target],
    config: Config,
    store: TokenStore,
    device: torch.device,
    waiting: Waiting | None = None,
) -> tuple[dict[str, Factors], InitReport, DataReport | None]:
    """A~ and B~ of every target; all workers must call it together.

    See `initialise`, `eva_factors` and `gradient_factors`. For a method that looks at data the base must be where it is
    trained, tested, and without adapters.
    """
    adapter = config.adapter
    if adapter.method not in FROM_WEIGHTS:
        make = gradient_factors if METHODS[adapter.method].needs == "gradients" else eva_factors
        return make(loss, targets, adapter, store, device, waiting)
    seed, options = config.run.seed, options_of(adapter)
    return *initialise(_whole(loss, targets), adapter.method, adapter.rank, seed, device, options), None


def _whole(loss: SupervisedLoss, targets: Mapping[str, Target]) -> dict[str, Target]:
    """The targets, with all of their numbers: a sharded base has them in its files, each layer for whom it is asked."""
    if loss.files is None:
        return dict(targets)
    parameters = {name: parameter_of(loss.model, name) for name in targets}
    return {name: replace(target, read=partial(loss.files.rows, parameters[name])) for name, target in targets.items()}
