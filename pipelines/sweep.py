"""Search adapter and training settings with Ray Tune, and register the best model.

    python pipelines/sweep.py CONFIG.yaml SPACE.yaml [section.field=value ...] [--register] [--refit]

CONFIG is a run's config (pipelines/configs/quickstart.yaml); SPACE says what varies and how it is searched
(tune_spaces/*.yaml). --register exports, checks and registers the best trial's model as it is. --refit trains
the best config as a run of its own, from the start and with all the steps of CONFIG, and registers that if
CONFIG says so. The same command again goes on with a search that was interrupted.
"""

from olora_ray.common.quiet import quiet_environment

quiet_environment()  # before Ray is imported

from olora_ray.config import command_line  # noqa: E402


def main(argv: list[str]) -> None:
    """The whole search, in the order in which the data flows."""
    config, file, flags = command_line.read_search_arguments(argv, usage=__doc__ or "")
    say = command_line.log_line
    from olora_ray.sweep.load_space import load

    space = load(file, config)
    from olora_ray.model import source
    from olora_ray.pipeline import fit, publish, report, run
    from olora_ray.sweep import run as sweep

    search = sweep.search_config(config, space, file, registers="--register" in flags)
    sweep.check(search, space)
    base = source.obtain(search, say, publish.registered(search))
    tokenizer = source.load_tokenizer(base, search.model)
    report.plan(search, base, say)

    with fit.connect(search, say, base):
        task, seconds = sweep.made_task(search, base, tokenizer, say)
        task, spared = sweep.share(task, space, seconds, say)
        with sweep.tracked(task, space) as tracker:
            job, found = sweep.run(task, space, spared, tracker, say)
            sweep.conclude(config, job, found, tracker, say)
            if "--register" in flags:
                sweep.register(job, found, say)
    if "--refit" in flags:
        run.run(sweep.best_config(config, job, found.ranked()[0], refit=True), say)


if __name__ == "__main__":
    command_line.run(main)
