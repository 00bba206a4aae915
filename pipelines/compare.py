"""Compare methods of initialising an adapter on your data, each at its own learning rate, with honest intervals.

    python pipelines/compare.py CONFIG.yaml [section.field=value ...] --methods lora,olora
        [--seeds 4] [--budget 3h]

CONFIG    is a run's config; its section `compare`, which other commands leave out, fixes the rows and the smallest
          difference that matters
--methods values of adapter.method; lora must be among them, which all others are compared with (default lora,olora)
--seeds   trainings of each method that are compared, each with another seed than the tuning (default 4)
--budget  ends before any training if the comparison is estimated to take longer

Rows are put in three sets: to train on, to choose each method's learning rate on, to compare on. The same command
again resumes a comparison that was interrupted; what has been trained is never trained again. See docs/evidence.md.
"""

from dataclasses import replace

from olora_ray.common.logs import quiet_environment

quiet_environment()  # before Ray is imported

from olora_ray.config import command_line  # noqa: E402


def main(argv: list[str]) -> None:
    """The whole comparison, in the order in which the data flows."""
    from comparison import arguments

    asked = arguments.parse(argv, usage=__doc__ or "")
    from olora_ray.tokens import first_look

    asked = replace(asked, config=first_look.check(asked.config))
    from comparison import analysis, folder, report, rows, run
    from olora_ray.pipeline.base import open_base
    from olora_ray.pipeline.connection import connect
    from olora_ray.pipeline.run import only_driver

    config = asked.config
    folder.check(asked)
    with only_driver(config) as driver:
        base = open_base(config)
        sizes = run.sizes(asked, base)
        sets = rows.split(config, asked.compare, base.spec)
        folder.begin(asked, {"base model": base.model.digest, "tokenizer": base.spec.digest, **sets.contents()})

        with connect(config, base.model) as stop, driver.watch(stop), run.tracked(asked, base) as tracker:
            work = run.Run(asked, base, sets, sizes, tracker.run_id)
            tuning = work.tune()
            finals = work.train(tuning)
            driver.check()
            found = analysis.record(work, tuning, finals, run.machine())
            report.conclude(found, config.folder(), tracker)


if __name__ == "__main__":
    command_line.run(main)
