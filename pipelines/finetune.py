"""Fine-tune a language model with OLoRA on a Ray cluster, check it, and
register it.

    python pipelines/finetune.py CONFIG.yaml [section.field=value ...]
        [--dry-run] [--show-config] [--help]
    olora-ray quickstart [section.field=value ...] [--dry-run]

The second has a CONFIG of its own, which trains a small model in minutes.

CONFIG         the run's config; `olora-ray init` writes one for your rows
--dry-run      print what the run would do with its data, and train nothing;
               same exit codes
--show-config  with --dry-run: print the whole config too, with every default
--help         print this text with the fields of a first run; `--help all`
               prints all fields

The command reads the base model and the rows that CONFIG names. It writes
checkpoints, the exported adapter and the report into the folder run.name of
run.storage, and registers the model in MLflow. Run the same command again to
resume. The stages of a run are in olora_ray/pipeline/run.py, one below the
other.

Exit codes: 0 the run is complete; 1 a bug, with its traceback; 2 an error that
you can fix; 75 run the same command again later; 130 or 143 stopped by Ctrl+C
or SIGTERM after a checkpoint.
"""

import logging

from olora_ray.common.logs import quiet_environment

quiet_environment()  # before Ray is imported

from olora_ray.config import command_line  # noqa: E402


def main(argv: list[str]) -> None:
    # torch, transformers and Ray are imported as late as possible: mistakes in the config are reported at once.
    config, flags = command_line.read_arguments(argv, usage=__doc__ or "")
    from olora_ray.data import detect

    found = detect.check_data(config)
    logging.getLogger("olora_ray").info("importing torch, transformers and Ray")
    if "--dry-run" in flags:
        from olora_ray.pipeline.dry_run import dry_run

        dry_run(config, show_config="--show-config" in flags, found=found)
    else:
        from olora_ray.cluster import address

        with address.begun():
            from olora_ray.pipeline import publish, run

            run.run(config, found=found)
        publish.push(config)


if __name__ == "__main__":
    command_line.run(main)
