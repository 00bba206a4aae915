"""Print a model's answers beside simple baselines and, for generated records, the best possible.

    python pipelines/mobility/report.py FOLDER ANSWERS.jsonl [--law LAW.csv]

FOLDER         what prepare.py wrote
ANSWERS.jsonl  what pipelines/evaluate.py wrote for FOLDER/test.jsonl with the scorer
               olora_ray.data.mobility.answer:next_place
--law          law.csv of generate.py, if the records come from there

The baselines look at exactly the stays that the model was shown, and at all that came before a target. The widths of
the time kernel are chosen on the stays between training and test. Intervals draw people, not rows.
"""

from pathlib import Path

from olora_ray.common.errors import UserError
from olora_ray.config import command_line


def main(argv: list[str]) -> None:
    """Read the files and print the table."""
    from olora_ray.evaluation import next_place

    found = command_line.parse(argv, __doc__ or "", options=("--law",))
    names = found.names()
    if len(names) != 2:
        raise UserError("arguments FOLDER and ANSWERS.jsonl: both are needed, and no more; --help shows how")
    law = Path(found.options["--law"]) if "--law" in found.options else None
    print("\n".join(next_place.report(Path(names[0]), Path(names[1]), law).lines()))


if __name__ == "__main__":
    command_line.run(main)
