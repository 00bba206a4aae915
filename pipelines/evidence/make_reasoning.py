"""Write rows of grade-school maths from a generator: reasoning-gym's gsm_symbolic, with its worked solutions.

    python pipelines/evidence/make_reasoning.py --out build/evidence/reasoning [--wheel FILE] [--rows 1024]
        [--heldout 448] [--seed 7] [--longest 400] [--split-by questions]

--out      folder for train.jsonl, heldout.jsonl and rows.json (counts and sha256 of both files)
--wheel    the wheel of reasoning-gym 0.1.25; default: pip downloads it (7 MB) into build/evidence/wheels
--rows     number of training rows
--heldout  number of rows for tuning and test
--seed     seed of the generator; question i is generated from seed + i, and no i is in both files
--longest  largest number of characters of a question with its solution; longer ones are left out
--split-by questions: both files have new questions of the same templates; templates: three tenths of the templates
           are held out as well, which is harder

The wheel is unpacked, not installed; only this generator is imported, which needs no other package. A question is left
out if its solution does not end in its answer, if the package's own verifier refuses the answer, or if the same
question came before, even with other names.

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
from row_files import Request, Row, Sets, lacking, normalised, rank, read_request, write

from olora_ray.config import command_line

WHEEL = wheels.Wheel(
    "reasoning-gym", "0.1.25", "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435", "Apache-2.0"
)
PACKAGE = ("reasoning_gym", "reasoning_gym.arithmetic", "reasoning_gym.arithmetic.gsm_symbolic")
INSTRUCTION = "Work in steps, and end with a line of #### and the number."
HELD_TEMPLATES = 0.3
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
    return {normalised(question.question), (question.template, *re.findall(r"\d+", question.solution))}


def held_templates(templates: Iterable[int], seed: int) -> set[int]:
    """Return three tenths of the templates, at least one, in an order that depends on the seed alone."""
    ordered = sorted(set(templates), key=lambda template: rank("template", seed, template))
    return set(ordered[: max(1, round(HELD_TEMPLATES * len(ordered)))])


def row(question: Question, by_template: bool) -> Row:
    group = f"template-{question.template:03d}" if by_template else f"question-{question.index:06d}"
    return Row(f"{question.question}\n{INSTRUCTION}", question.solution, group)


def fill(questions: Iterable[Question], templates: Iterable[int], request: Request) -> tuple[Sets, Counter[str]]:
    """Return both sets, and counts of left-out questions by reason; raises UserError if there are too few."""
    # None: both sets may have questions of every template.
    by_template = request.by == "templates"
    held = held_templates(templates, request.seed) if by_template else None
    wanted = {"--heldout": request.heldout, "--rows": request.rows}
    sets: dict[str, list[Row]] = {"--heldout": [], "--rows": []}
    seen, left_out = set[object](), Counter[str]()
    for question in questions:
        name = _set_of(question, held, len(sets["--heldout"]) < request.heldout)
        if len(sets[name]) < wanted[name]:
            if reason := fault(question, request.longest) or _again(question, seen):
                left_out[reason] += 1
                continue
            seen |= identity(question)
            sets[name].append(row(question, by_template))
        if all(len(sets[each]) == wanted[each] for each in wanted):
            return Sets(tuple(sets["--rows"]), tuple(sets["--heldout"])), left_out
    option = next(each for each in wanted if len(sets[each]) < wanted[each])
    raise lacking(option, wanted[option], sets[option])


def _again(question: Question, seen: set[object]) -> str | None:
    return "the same question again" if identity(question) & seen else None


def _set_of(question: Question, held: set[int] | None, room: bool) -> str:
    # Held-out rows are filled first, so that they do not depend on the number of training rows.
    if held is None:
        return "--heldout" if room else "--rows"
    return "--heldout" if question.template in held else "--rows"


def main(argv: list[str]) -> None:
    request = read_request(argv, __doc__ or "", "--split-by")
    wheel = wheels.obtain(WHEEL, request.wheel, Path("build/evidence/wheels"))
    with tempfile.TemporaryDirectory() as folder:
        wheels.unpack(wheel, Path(folder))
        generator = load_generator(Path(folder))
        made = questions(generator, request.seed, MOST_TRIES * (request.rows + request.heldout))
        sets, left_out = fill(made, generator.tasks_ok, request)
    about = {
        "source": f"{WHEEL.requirement()} gsm_symbolic, {WHEEL.licence}",
        "wheel": WHEEL.sha256,
        "seed": request.seed,
        "longest": request.longest,
        "held out": request.by,
        "left out": dict(left_out),
    }
    write(request.out, sets, about)
    print("left out: " + (", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "none"))


if __name__ == "__main__":
    command_line.run(main)
