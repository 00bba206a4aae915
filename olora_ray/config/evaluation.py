"""The config of an evaluation whose model comes from no run: no training data, no adapter, no registry."""

from olora_ray.config.schema import Cluster, Config, Data, Evaluation, Model, Run, Section, Source, Tracking, Train


class EvaluationData(Data):
    """Held-out rows, if any, and how they become sequences."""

    train: tuple[Source, ...] = ()


class EvaluationConfig(Section):
    """What an evaluation reads of a config; only the model has no default."""

    model: Model
    run: Run = Run(name="evaluation")
    """Of this only `storage` and `seed` count: an evaluation has no folder of its own."""
    data: EvaluationData = EvaluationData()
    train: Train = Train()
    """Of this only `micro_batch` counts: sequences that go through the model at once."""
    cluster: Cluster = Cluster()
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()


AnyConfig = Config | EvaluationConfig
"""What can be evaluated with: a run's config, or one without a run."""
