"""Search adapter and training settings with Ray Tune, and register the best model.

    python pipelines/sweep.py CONFIG.yaml SPACE.yaml [section.field=value ...] [--register] [--refit]

CONFIG is a run's config (pipelines/configs/quickstart.yaml); SPACE says what varies and how it is searched
(tune_spaces/*.yaml). --register exports, checks and registers the best trial's model as it is. --refit trains
the best config as a run of its own, from the start and with all the steps of CONFIG, and registers that if
CONFIG says so. The same command again resumes a search that was interrupted.
"""

from olora_ray.common.logs import quiet_environment

quiet_environment()  # before Ray is imported

from olora_ray.config import command_line  # noqa: E402


def main(argv: list[str]) -> None:
    """The whole search, in the order in which the data flows."""
    config, file, flags = command_line.read_search_arguments(argv, usage=__doc__ or "")
    from olora_ray.tokens import first_look

    config = first_look.check(config)
    from olora_ray.sweep.space_file import load

    space = load(file, config)
    from olora_ray.pipeline import prepare, run
    from olora_ray.pipeline.base import open_base
    from olora_ray.pipeline.connection import connect
    from olora_ray.pipeline.run import only_driver
    from olora_ray.sweep import outcome, search_folder, space_file
    from olora_ray.sweep import run as sweep

    if config.data.max_length == "auto":
        config = prepare.with_length(config, open_base(config))
    search = search_folder.search_config(config, space, file, registers="--register" in flags)
    search_folder.check(search, space)
    with only_driver(search) as driver:
        base = open_base(search)
        space_file.plan(search, space, base.model)

        with connect(search, base.model) as stop, driver.watch(stop):
            spec, seconds = sweep.train_spec(search, space, base)
            spec, spared = sweep.share(spec, space, seconds)
            with sweep.tracked(spec, space) as tracker:
                sweep_spec, found = sweep.run(spec, space, spared, tracker)
                driver.check()
                outcome.conclude(config, sweep_spec, found, tracker)
                if "--register" in flags:
                    outcome.register(sweep_spec, found)
        if "--refit" in flags:
            run.run(outcome.best_config(config, sweep_spec, found.ranked()[0], refit=True))


if __name__ == "__main__":
    command_line.run(main)
