"""The plan of benchmarks/settings.py."""

from typing import Any


def test_experiment_1_of_what_lasts_trains_three_rates_of_the_spectral_step_on_each_task(
    benchmark: Any,
) -> None:
    settings = benchmark("settings")
    planned = settings.missing_of_lasting(settings.Results([]))
    auto = settings.first_step.for_steps(settings.SPECTRAL_MIDDLE, 200)
    rates = [float(f"{auto * training.factor:.3g}") for training in planned]
    assert rates == [0.0012, 0.0017, 0.0008] * 3
    assert {training.seed for training in planned} == {settings.TUNING_SEED}
    done = planned[0]
    line = {**vars(done.cell), "seed": done.seed, "factor": done.factor, "auto": auto, "loss": 0.05}
    assert settings.missing_of_lasting(settings.Results([line])) == planned[1:]
