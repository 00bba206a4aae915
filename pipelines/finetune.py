"""Fine-tune a language model with OLoRA on a Ray cluster, check it, register it.

    python pipelines/finetune.py [CONFIG.yaml] [section.field=value ...] [--dry-run] [--show-config] [--help]

--dry-run      shows what the run would do with its data, and starts nothing; it ends as the run would end
--show-config  with --dry-run: also the whole config, with every default filled in

Without arguments it runs pipelines/configs/quickstart.yaml. The stages, from the base model to the registered
version, stand one below the other in olora_ray/pipeline/run.py.
"""

import logging
from pathlib import Path

from olora_ray.common.logs import quiet_environment

quiet_environment()  # before Ray is imported

from olora_ray.config import command_line  # noqa: E402

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"


def main(argv: list[str]) -> None:
    """Read the arguments; show what would be done, or do it."""
    config, flags = command_line.read_arguments(argv, QUICKSTART, usage=__doc__ or "")
    from olora_ray.tokens import first_look

    config = first_look.check(config)
    logging.getLogger("olora_ray").info("importing torch, transformers and Ray")
    if "--dry-run" in flags:
        from olora_ray.pipeline.dry_run import dry_run

        dry_run(config, show_config="--show-config" in flags)
    else:
        from olora_ray.pipeline import run

        run.run(config)


if __name__ == "__main__":
    command_line.run(main)
