"""Compare ways to initialise an adapter on your data, each at its own learning rate, with intervals of the differences.

    python pipelines/compare.py CONFIG.yaml [section.field=value ...] --methods lora,olora
        [--seeds 4] [--budget 3h]

CONFIG     a run's config; its section `compare`, which other commands ignore, sets the numbers of rows and the
           smallest difference that matters
--methods  values of adapter.method, with commas; must contain lora: all others are compared with it
           (default lora,olora)
--seeds    number of trainings per method that are compared, each with its own seed (default 4)
--budget   time limit, such as 3h or 90m; if the estimate is longer, the command ends before any training

The command puts the rows of the config into three sets: to train on, to choose each method's learning rate on, and to
compare on. It writes report.html, the figures and comparison.json into the folder RUN-compare of run.storage, and logs
them to MLflow. Run the same command again to resume: no finished training runs again. See docs/evidence.md.

Exit codes: 0 the comparison is complete; 1 a bug, with its traceback; 2 an error that you can fix; 75 run the same
command again later; 130 or 143 stopped by Ctrl+C or SIGTERM.
"""

from dataclasses import replace

from olora_ray.common.logs import quiet_environment

quiet_environment()  # before Ray is imported

from olora_ray.config import command_line  # noqa: E402


def main(argv: list[str]) -> None:
    # Imports that take seconds come after the checks of arguments and rows, so that mistakes are reported at once.
    from comparison import arguments

    comparison = arguments.parse(argv, usage=__doc__ or "")
    from olora_ray.tokens import first_look

    comparison = replace(comparison, config=first_look.check(comparison.config))
    from comparison import analysis, folder, report, rows, run
    from olora_ray.pipeline.base import open_base
    from olora_ray.pipeline.connection import connect
    from olora_ray.pipeline.run import only_driver

    config = comparison.config
    folder.check(comparison)
    with only_driver(config) as driver:
        base = open_base(config)
        sizes = run.sizes(comparison, base)
        sets = rows.split(config, comparison.compare, base.spec)
        folder.begin(comparison, {"base model": base.model.digest, "tokenizer": base.spec.digest, **sets.contents()})

        with connect(config, base.model) as stop, driver.watch(stop), run.tracked(comparison, base) as tracker:
            work = run.Run(comparison, base, sets, sizes, tracker.run_id)
            tuning = work.tune()
            finals = work.train(tuning)
            driver.check()
            record = analysis.record(work, tuning, finals, run.machine())
            report.conclude(record, config.folder(), tracker)


if __name__ == "__main__":
    command_line.run(main)
