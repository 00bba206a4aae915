"""Writes docs/generated/models.md: results of a run with a tiny model of each family in tests/families.

    .venv/bin/python tools/write_models.py                  (make models; half an hour)
    .venv/bin/python tools/write_models.py --templates      only the part on chat templates (some seconds)

Each model goes through a complete run without Ray, and is compared with the model's own forward pass
(tests/families/check.py). tests/data/template_zoo.py checks the chat templates.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this tree first, because another release may be installed

import transformers  # noqa: E402

from tests.data import template_zoo  # noqa: E402
from tests.families import every, planted, table  # noqa: E402
from tests.families.check import check  # noqa: E402
from tests.families.row import PRECISIONS, Row  # noqa: E402
from tests.families.variants import ALL, LONGEST  # noqa: E402

PAGE = ROOT / "docs" / "generated" / "models.md"
INTRO = """\
# Models

<!-- Written by `make models` from tests/families: change the words in tools/write_models.py. -->

`model.name` accepts any causal language model of transformers, also one with vision: its language model is trained on
text, its other parts stay unchanged. Before the first step of every run, a self-test checks that this model is trained
correctly, and a model that fails is refused in one line. This page shows the results for tiny random models: {families}
variants of families in two precisions, then every other family.

Each model goes through a complete run on a CPU, with the default settings, rank 4 on `all-linear`, and at most
{longest} tokens per sequence. Right means: the untrained adapter changes no loss by a single bit, losses, gradients and
exports are those of the model's own code in transformers and PEFT, and the run's own comparison of the exports passes.
A line of a table has the largest relative differences of its models:

| column | measured value |
|---|---|
| models | in brackets: share of the parameters in adapted layers, without embeddings and output head, below 90 % |
| experts | yes if the experts of a mixture are adapted; none: the model has no experts |
| attention | attention kernel that the run has chosen |
| packed | losses of packed and of single examples; apart: each example has its own sequence |
| by positions | the same for the model's own forward pass, if only positions separate the packed examples |
| loss, gradients | ours and those from the model's own forward pass |
| export | losses of the trained model and of its exports (merged model, adapter in PEFT) |

In float32 the bounds are exact. In bfloat16 a difference is compared with that between the model's own forward passes
in bfloat16 and float32.
"""

TEMPLATES = """\
## Chat templates

The results of conversations with the {count} chat templates in TRL's package. A case is right if each answer follows
exactly the ids that a server would send (the template with its generation prompt, on the messages so far), contains
everything in the row, and ends with a token at which the model stops. A row that the template cannot express is
rejected, with advice. `data.chat_template` selects another template.

| case | messages |
|---|---|
| plain, system, turns | one question and answer; the same with a system message; two questions and answers |
| tools, tools as text | a tool call, its result and an answer; the arguments are an object, or JSON text |
| beside a call, call alone | the same with text in the message with the call; a call as last message, without tools |
| reasoning_content, thinking, reasoning | two answers with reasoning in a field of that name |
| in content | reasoning as `<think>...</think>` at the start of the content |
"""
POWER = """\
For each row, one mistake is built into a tiny model. Then the self-test before the first step (docs/method.md) runs. It
refuses none of the correct models above. In bfloat16, rounding hides a mistake that changes an output by less than 3 %,
such as a missing last token in a window of some thousand tokens.
"""


def main() -> int:
    if not template_zoo.sources():
        raise SystemExit(
            "TRL's package, which has the chat templates, is not installed; run `make setup`"
        )
    if "--templates" in sys.argv:
        before, _, _ = PAGE.read_text(encoding="utf-8").partition("\n## Chat templates\n")
        parts = [before]
    else:
        parts = [INTRO.format(families=len(ALL), longest=LONGEST)]
        for precision in PRECISIONS:
            parts += section(precision, list(_rows(precision)))
        parts += every_section(_every())
        parts += planted_section()
    parts += [TEMPLATES.format(count=len(template_zoo.sources())), template_zoo.table()]
    PAGE.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")
    print(f"written: {PAGE.relative_to(ROOT)}")
    return 0


EVERY = "## Every other family"
OTHERS = """\
All other model types in transformers' mapping of causal language models, and {seeing} models with vision. Each family's
own config decides the sizes, so some of these models fail although published models of the family do not. In float32,
with {release}: {summary}.
"""


def release() -> str:
    return f"transformers {transformers.__version__}"


def _every() -> list[Row]:
    # The variants above are chosen by hand. This section covers every other model type that transformers has.
    rows = []
    for family in every.others():
        rows.append(every.row(family))
        print(f"{family}: {rows[-1].verdict}", file=sys.stderr, flush=True)
    return rows


def every_section(rows: list[Row]) -> list[str]:
    return [
        EVERY,
        OTHERS.format(seeing=len(every.SEEING), release=release(), summary=table.summary(rows)),
        table.table(rows),
    ]


def heading(precision: str) -> str:
    return f"## {str(PRECISIONS[precision]).removeprefix('torch.')}"


def planted_section() -> list[str]:
    return ["## What the self-test finds", POWER, planted.table(planted.MISTAKES)]


def section(precision: str, rows: list[Row]) -> list[str]:
    return [heading(precision), f"{table.summary(rows)}.", table.table(rows)]


def _rows(precision: str) -> Iterator[Row]:
    for variant in ALL.values():
        with tempfile.TemporaryDirectory() as folder:
            row = check(variant, precision, Path(folder))
        print(f"{precision} {row.name}: {row.verdict}", file=sys.stderr, flush=True)
        yield row


if __name__ == "__main__":
    sys.exit(main())
