"""Fine-tune a language model with OLoRA on a Ray cluster, check it, register it.

    python pipelines/finetune.py [CONFIG.yaml] [section.field=value ...] [--dry-run] [--help]

Without arguments it runs pipelines/configs/quickstart.yaml.
"""

from pathlib import Path

from olora_ray.quiet import quiet_environment

quiet_environment()  # before Ray is imported

from olora_ray import command  # noqa: E402

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"


def main(argv: list[str]) -> None:
    """The whole pipeline, in the order in which the data flows."""
    config, dry_run = command.read_arguments(argv, QUICKSTART, usage=__doc__ or "")
    say = command.log_line
    from olora_ray import deliver, launch, model, report
    from olora_ray.data.tokenize import spec_from_pretrained
    from olora_ray.run_folder import RunFolder
    from olora_ray.task import Task

    if dry_run:
        report.dry_run(config, say)
        return

    folder = RunFolder(config)
    folder.check()
    if done := folder.finished():
        report.already_finished(config, done, say)
        return
    deliver.check_tracking(config, folder)
    base = model.obtain(config, say, deliver.registered(config))
    tokenizer = model.load_tokenizer(base, config.model)
    spec = spec_from_pretrained(tokenizer, base.name)
    report.plan(config, base, say)

    with launch.connect(config, say, base) as stop, launch.tokens(config, spec, say) as (training, held_out):
        eos = model.end_tokens(base, tokenizer)
        task = Task(config, base, spec.digest, eos, training.store, held_out, launch.make_board())
        report.steps(task, say)
        outcome = deliver.trained(task, folder, say)
        folder.claim()
        with deliver.tracked(task, folder) as tracker:
            outcome = outcome or launch.train(task, folder, training, tracker, stop, say)
            parity = launch.run_export(task, folder, outcome, say)
            version = deliver.publish(task, folder, tracker, outcome, parity, say)
            answers = report.texts(outcome, tokenizer)
            finished = report.finish(task, folder, tracker, outcome, answers, parity, version)
        folder.write_result(finished.result)  # nothing is left to be logged
        finished.show(say)


if __name__ == "__main__":
    command.run(main)
