"""Retrain a registered model if its data, base model or settings have changed,
and promote the result if it is better.

    python pipelines/retrain.py CONFIG.yaml [section.field=value ...]
        [--dry-run] [--help]

CONFIG     a run's config with registry.model; its sections retrain, gate and
           notify set the conditions
--dry-run  only print what a call would do now: with which rows, from which
           model, whether the gate can pass, and how long the last trainings
           took; it starts no Ray

Made for a scheduler: run it as often as you like. If nothing has changed, it
says so within seconds. Else it trains a challenger, evaluates it and the
champion on the same held-out rows, and moves the alias `champion` if the
config's gate allows it. The next call resumes a call that was interrupted. If
two calls run at once, the second ends with exit code 75.

Exit codes: 0 the decision is made, also if the challenger is refused or nothing
has changed; 1 a bug, with its traceback; 2 an error that you can fix; 75 run
the same command again later; 130 or 143 stopped by Ctrl+C or SIGTERM.
"""

from typing import TYPE_CHECKING

from olora_ray.common.logs import quiet_environment

quiet_environment()  # before Ray is imported

from olora_ray.config import command_line  # noqa: E402

if TYPE_CHECKING:
    from olora_ray.retrain.decision_run import Entry

FIELDS = ("registry.model", "retrain", "gate", "notify")
"""The fields and sections that --help shows."""


def main(argv: list[str]) -> "Entry | None":
    """Retrain; return the decision, or None after a dry run."""
    # The retraining is imported late: a mistake in the config is reported at once.
    config, flags = command_line.read_arguments(
        argv, usage=__doc__ or "", flags=("--dry-run",), first=FIELDS
    )
    if flags:
        from olora_ray.retrain.dry_run import dry_run

        dry_run(config)
        return None
    from olora_ray.retrain import run

    return run.run(config)


if __name__ == "__main__":
    command_line.run(main)
