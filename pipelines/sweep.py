"""Search adapter and training settings with Ray Tune, and register the best
model.

    python pipelines/sweep.py CONFIG.yaml SPACE.yaml [section.field=value ...]
        [--register] [--refit]

CONFIG      a run's config, such as pipelines/configs/quickstart.yaml
SPACE       the fields that vary, and how they are searched (tune_spaces/*.yaml)
--register  export, check and register the best trial's model, without a new
            training
--refit     train the best config as a run of its own, with all the steps of
            CONFIG; it is registered if CONFIG says so

The command writes the trials and report.html into the search's folder in
run.storage, and logs them to MLflow. Run the same command again to resume.

Exit codes: 0 the search is complete; 1 a bug, with its traceback; 2 an error
that you can fix; 75 run the same command again later; 130 or 143 stopped by
Ctrl+C or SIGTERM.
"""

from typing import TYPE_CHECKING

from olora_ray.common.logs import quiet_environment

quiet_environment()  # before Ray is imported

from olora_ray.config import command_line  # noqa: E402

if TYPE_CHECKING:
    from olora_ray.sweep.record import SearchRecord


def main(argv: list[str]) -> "tuple[str, SearchRecord]":
    """Search; return the search's folder and its record."""
    # Imports that take seconds come after the checks of config and space file, so that mistakes are reported at once.
    config, file, flags = command_line.read_search_arguments(argv, usage=__doc__ or "")
    from olora_ray.data import detect

    config = detect.with_formats(config, detect.check_data(config))
    from olora_ray.sweep.space_file import load_space

    space = load_space(file, config)
    from olora_ray.cluster.connection import connect
    from olora_ray.pipeline import prepare, run
    from olora_ray.pipeline.base import open_base
    from olora_ray.pipeline.run import only_driver
    from olora_ray.sweep import outcome, search_folder, space_file
    from olora_ray.sweep import run as sweep

    search = search_folder.search_config(config, space, file, registers="--register" in flags)
    kept = search_folder.check_search(search, space)
    with only_driver(search) as driver:
        base = open_base(search)
        # Once for all trials, which must have the same sequences.
        data = prepare.read_data(search, base, kept)
        space_file.plan(search, data, space, base)

        with connect(search, trains=True) as (stop, cluster), driver.watch(stop):
            decided = prepare.decided(search, data, base.model, cluster, kept, trial=True)
            spec, seconds = sweep.train_spec(decided, space, base, cluster)
            spec, spared = sweep.share(spec, space, seconds, decided.decisions)
            with sweep.tracked(spec, space) as tracker:
                sweep_spec, results = sweep.run(spec, space, spared, tracker, decided.decisions)
                driver.check()
                outcome.conclude(config, sweep_spec, results, tracker)
                if "--register" in flags:
                    outcome.register(sweep_spec, results)
        if "--refit" in flags:
            run.run(outcome.best_config(config, sweep_spec, results.ranked()[0], refit=True))
    return sweep_spec.folder, results


if __name__ == "__main__":
    command_line.run(main)
