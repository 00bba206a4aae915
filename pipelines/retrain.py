"""Retrain a registered model if its data, base model or settings have changed, and let it earn its place.

    python pipelines/retrain.py CONFIG.yaml [section.field=value ...] [--help]

For a scheduler: call it as often as you like. It says "nothing changed" within seconds, or trains a challenger,
measures it and the champion on the same held-out rows, and moves the alias `champion` if the config's gate lets
it. A call that was cut off is continued by the next; of two at once one gives way with exit code 75. Exit code 0
means that all is decided, also if that is a refusal.
"""

from olora_ray.common.logs import quiet_environment

quiet_environment()  # before Ray is imported

from olora_ray.config import command_line  # noqa: E402


def main(argv: list[str]) -> None:
    """Read the arguments and retrain, if there is a reason to."""
    config, _ = command_line.read_arguments(argv, None, usage=__doc__ or "", flags=())
    from olora_ray.retrain import run

    run.run(config)


if __name__ == "__main__":
    command_line.run(main)
