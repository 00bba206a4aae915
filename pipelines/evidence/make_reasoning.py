"""Write rows of grade-school maths from a generator: reasoning-gym's gsm_symbolic, with its worked solutions.

    python pipelines/evidence/make_reasoning.py --out build/evidence/reasoning [--wheel FILE] [--rows 1024]
        [--heldout 448] [--seed 7] [--longest 400] [--split-by questions]

--out      folder for train.jsonl, heldout.jsonl and rows.json (counts and sha256 of both)
--wheel    the wheel of reasoning-gym 0.1.25; without it pip downloads it (7 MB) into build/evidence/wheels
--rows     training rows
--heldout  rows for tuning and test
--seed     seed of the generator; question number i is made of seed + i, and no number is in both files
--longest  most characters of a question with its solution; longer ones are left out
--split-by questions: both files have new questions of the same templates; templates: three tenths of the templates
           are held out as well, which is harder

The wheel is unpacked, not installed: of the package only this generator is imported, which needs nothing else.
A question is left out where its solution does not end in its answer or the package's own verifier refuses it, and
where the same question was there before, also if only its names are others.
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
from row_files import Row, Sets, lacking, normalised, positive, rank, write

from olora_ray.common.errors import UserError
from olora_ray.config import command_line

WHEEL = wheels.Wheel(
    "reasoning-gym", "0.1.25", "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435", "Apache-2.0"
)
PACKAGE = ("reasoning_gym", "reasoning_gym.arithmetic", "reasoning_gym.arithmetic.gsm_symbolic")
INSTRUCTION = "Work in steps, and end with a line of #### and the number."
HELD_TEMPLATES = 0.3
MOST_TRIES = 20
"""Questions that are made for each row that is wanted, at most."""


@dataclass(frozen=True)
class Question:
    """What the generator made of one number."""

    index: int
    template: int
    question: str
    solution: str
    answer: str
    accepted: bool
    """Whether the package's verifier takes the package's answer."""


@dataclass(frozen=True)
class Request:
    """The command line."""

    out: Path
    wheel: str | None
    rows: int
    heldout: int
    seed: int
    longest: int
    by_template: bool


def read_request(argv: list[str]) -> Request:
    """Raises UserError for what it does not know."""
    options = ("--out", "--wheel", "--rows", "--heldout", "--seed", "--longest", "--split-by")
    found = command_line.parse(argv, usage=__doc__ or "", options=options)
    given = found.options
    if found.words or "--out" not in given:
        raise UserError(f"argument {found.words[0]}: not known" if found.words else "argument --out: missing")
    if (by := given.get("--split-by", "questions")) not in ("questions", "templates"):
        raise UserError(f"argument --split-by: expected questions or templates, not {by!r}")
    defaults = {"--rows": "1024", "--heldout": "448", "--seed": "7", "--longest": "400"}
    rows, heldout, seed, longest = (positive(name, given.get(name, value)) for name, value in defaults.items())
    return Request(Path(given["--out"]), given.get("--wheel"), rows, heldout, seed, longest, by == "templates")


def load_generator(folder: Path) -> ModuleType:
    """The generator's module in an unpacked wheel.

    Its parents are made empty: as they are, they import all generators, and with them packages that this one does
    not need.
    """
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE[0]]:
        del sys.modules[name]
    for name in PACKAGE:
        parent = ModuleType(name)
        parent.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = parent
    import_module(f"{PACKAGE[0]}.coaching")  # before what imports it: the package's modules import each other
    return import_module(f"{PACKAGE[-1]}.gsm_symbolic")


def questions(generator: ModuleType, seed: int, size: int) -> Iterator[Question]:
    """The generator's questions, in the order of their numbers."""
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
    """Why a question is left out, if it is."""
    if not question.accepted:
        return "the package's verifier refuses its own answer"
    answer = scorers.number(question.answer)
    if answer is None or scorers.marked_number(question.solution) != answer:
        return "the solution does not end in the answer"
    return "too long" if len(question.question) + len(question.solution) > longest else None


def identity(question: Question) -> set[object]:
    """What no two questions have in common: the text, and a template with the numbers of its solution."""
    return {normalised(question.question), (question.template, *re.findall(r"\d+", question.solution))}


def held_templates(templates: Iterable[int], seed: int) -> set[int]:
    """Three tenths of the templates, one at least, in an order that depends on the seed alone."""
    ordered = sorted(set(templates), key=lambda template: rank("template", seed, template))
    return set(ordered[: max(1, round(HELD_TEMPLATES * len(ordered)))])


def row(question: Question, by_template: bool) -> Row:
    """The question as it is asked, and its solution; `group` is the template where these are held out."""
    group = f"template-{question.template:03d}" if by_template else f"question-{question.index:06d}"
    return Row(f"{question.question}\n{INSTRUCTION}", question.solution, group)


def fill(found: Iterable[Question], templates: Iterable[int], request: Request) -> tuple[Sets, Counter[str]]:
    """Both sets, and how many questions were left out, by reason; raises UserError if they do not suffice."""
    held = held_templates(templates, request.seed) if request.by_template else None
    wanted = {"--heldout": request.heldout, "--rows": request.rows}
    sets: dict[str, list[Row]] = {"--heldout": [], "--rows": []}
    seen, left_out = set[object](), Counter[str]()
    for question in found:
        name = _set_of(question, held, len(sets["--heldout"]) < request.heldout)
        if len(sets[name]) < wanted[name]:
            if reason := fault(question, request.longest) or _again(question, seen):
                left_out[reason] += 1
                continue
            seen |= identity(question)
            sets[name].append(row(question, request.by_template))
        if all(len(sets[each]) == wanted[each] for each in wanted):
            return Sets(tuple(sets["--rows"]), tuple(sets["--heldout"])), left_out
    option = next(each for each in wanted if len(sets[each]) < wanted[each])
    raise lacking(option, wanted[option], sets[option], "ask for fewer, or set --longest higher")


def _again(question: Question, seen: set[object]) -> str | None:
    return "the same question again" if identity(question) & seen else None


def _set_of(question: Question, held: set[int] | None, room: bool) -> str:
    if held is None:  # held-out rows first: they stay the same whatever the number of training rows
        return "--heldout" if room else "--rows"
    return "--heldout" if question.template in held else "--rows"


def main(argv: list[str]) -> None:
    """Get the wheel, make the rows, write them, and say what became of them."""
    request = read_request(argv)
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
        "held out": "templates" if request.by_template else "questions",
        "left out": dict(left_out),
    }
    digests = write(request.out, sets, about)
    for name, rows in (("train.jsonl", sets.train), ("heldout.jsonl", sets.heldout)):
        print(f"{request.out / name}: {len(rows)} rows, sha256 {digests[name]}")
    print("left out: " + (", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "none"))


if __name__ == "__main__":
    command_line.run(main)
