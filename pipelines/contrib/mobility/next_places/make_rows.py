"""Write the rows of the recipe: stays of generated people, and the place of their next one.

    python pipelines/contrib/mobility/next_places/make_rows.py FOLDER

Writes train.jsonl and heldout.jsonl, always with the same bytes, by the two commands for any records: generate.py and
prepare.py of pipelines/contrib/mobility. A held-out question asks for a stay after all that the person was trained on.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

MOBILITY = Path(__file__).resolve().parents[1]


def rule(question: str) -> str:
    """The place that most often followed the last one shown, else the most frequent"""
    places = re.findall(r"\w+ \d+h (\d+)", question.partition("<target>")[0])
    followed = [after for before, after in pairwise(places) if before == places[-1]]
    return json.dumps({"prediction": int(Counter(followed or places).most_common(1)[0][0])})


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    run("generate.py", "--people", 300, "--days", 14, "--places", 24, "--busy", 0.22, "--explore", 0.1,
        "--variety", 0.5, "--out", folder / "records")  # fmt: skip
    run("prepare.py", folder / "records" / "check_ins.csv", "--format", "checkins", "--form", "hours", "--history", 10,
        "--context", 4, "--turns", 10, "--rows", "train=330,eval=60,test=200", "--out", folder)  # fmt: skip
    (folder / "test.jsonl").replace(folder / "heldout.jsonl")


def run(command: str, *words: object) -> None:
    subprocess.run([sys.executable, MOBILITY / command, *map(str, words)], check=True)


if __name__ == "__main__":
    main()
