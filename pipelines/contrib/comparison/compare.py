"""Compare adapters on your data, each at its own learning rate, with intervals
of the differences.

    olora-ray compare CONFIG.yaml [section.field=value ...] --methods lora,olora
        [--arm "NAME: field=value, field=value"] [--seeds 4]

CONFIG     a run's config; its section `compare`, which other commands ignore,
           sets the numbers of rows, the learning rates and the smallest
           difference that matters
--methods  arms of the comparison that differ in adapter.method (default
           lora,olora, without --arm)
--arm      one more arm: its name, and the fields of adapter and train in which
           it differs from the config, e.g. --arm "r64: adapter.rank=64,
           adapter.alpha=64"; repeat it for each arm
--seeds    number of trainings per arm that are compared, each with its own seed
           (default 4)

All arms are compared with the arm `lora` if there is one, otherwise with the
first. The command puts the rows of the config into three sets: to train on, to
choose each arm's learning rate on, and to compare on. It writes report.html,
the figures, comparison.json and best.yaml, the config of the arm with the
lowest loss, into the folder RUN-compare of run.storage, and logs them to
MLflow. Run the same command again to resume, or with more seeds or arms: no
finished training runs again. See docs/evidence.md.

Exit codes: 0 the comparison is complete; 1 a bug, with its traceback; 2 an
error that you can fix; 75 run the same command again later; 130 or 143 stopped
by Ctrl+C or SIGTERM.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from olora_ray.common.logs import quiet_environment

# The folder of the package `comparison`, of which this script is a module: Python adds only the script's own folder.
sys.path.append(str(Path(__file__).resolve().parents[1]))


quiet_environment()  # before Ray is imported

from olora_ray.config import command_line  # noqa: E402

if TYPE_CHECKING:
    from comparison.record import ComparisonRecord


def main(argv: list[str]) -> "tuple[str, ComparisonRecord]":
    """Compare; return the comparison's folder and its record."""
    # Imports that take seconds come after the checks of arguments and rows, so that mistakes are reported at once.
    from comparison import arguments

    comparison = arguments.parse(argv, usage=__doc__ or "")
    from olora_ray.data import detect

    config = comparison.config
    config = detect.with_formats(config, detect.check_data(config))
    comparison = replace(comparison, config=config)
    from comparison import folder, report, rows, run
    from comparison.record import best_config, recorded
    from olora_ray.cluster.connection import connect
    from olora_ray.pipeline import prepare
    from olora_ray.pipeline.base import open_base
    from olora_ray.pipeline.run import only_driver

    folder.check(comparison)
    with only_driver(config) as driver:
        base = open_base(config)
        data = prepare.read_data(config, base)
        sizes = run.sizes(comparison, data, base)
        sets = rows.split(data.config, comparison.compare, base.spec)
        folder.begin(
            comparison,
            {"base model": base.model.digest, "tokenizer": base.spec.digest, **sets.contents()},
        )
        sets.write(config)

        with (
            connect(config, trains=True) as (stop, cluster),
            driver.watch(stop),
            run.tracked(comparison, base) as tracker,
        ):
            decided = prepare.decided(config, data, base.model, cluster, trial=True)
            work = run.Run(comparison, decided, base, sets, sizes, tracker.run_id)
            tuning = work.tune()
            finals = work.train(tuning)
            driver.check()
            record = recorded(work, tuning, finals, run.machine())
            report.conclude(record, best_config(comparison, record), config.folder(), tracker)
    return config.folder(), record


if __name__ == "__main__":
    command_line.run(main)
