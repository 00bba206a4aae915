"""Writes docs/generated/models.md: what becomes of a tiny model of each family in tests/families, measured here.

    .venv/bin/python tools/write_models.py                  (make models; half an hour)
    .venv/bin/python tools/write_models.py --templates      the part on chat templates alone; some seconds

Each model goes through a whole run without Ray, beside what the model itself says (tests/families/check.py). What
becomes of conversations under the chat templates of families is found by tests/data/template_zoo.py.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the models and functions of this tree, whatever is installed

from tests.data import template_zoo  # noqa: E402
from tests.families import every, planted, table  # noqa: E402
from tests.families.check import check  # noqa: E402
from tests.families.row import PRECISIONS, Row  # noqa: E402
from tests.families.variants import ALL, LONGEST, MORE, NAMED  # noqa: E402

PAGE = ROOT / "docs" / "generated" / "models.md"
INTRO = """\
# Models

<!-- Written by `make models` from tests/families: change the words in tools/write_models.py. -->

Any causal language model of transformers may be named in `model.name`, and a model that sees, whose language model is
trained on text, while all else of it stays as it is. Whether it is trained right is measured before
the first step, for whatever model came; what fails is refused in one line. This page shows what becomes of tiny random
models of {families} variants of families: the {named} of a review in November 2026, and {more} others.

Each goes through a whole run on a CPU, with the defaults, rank 4 on `all-linear`, and {longest} tokens at most:

| column | what is measured |
|---|---|
| adapted | share of the parameters behind an adapter, embeddings and output head left out |
| experts | whether the experts of a mixture are adapted; none: it has none |
| attention | the implementation that the run has chosen |
| start | whether the untrained adapter leaves every loss as it is, to the bit |
| packed | loss of packed examples beside that of single ones; apart: each has a sequence of its own |
| by positions | loss of the model's own forward if packed examples are told apart by positions alone |
| loss | loss of single examples beside that of the logits of the model's own forward |
| gradients | gradients of all adapters beside those that follow from the model's own by automatic differentiation |
| export | loss of the merged model, and of the adapter in PEFT, beside that of the trained model |
| parity | the run's own comparison of both |
| verdict | right to the end; or refused before the first step, and why |

Differences are relative, and bounds are exact ones in float32; in bfloat16 what counts is how far the model's own
forward pass is from its float32 one.
"""

TEMPLATES = """\
## Chat templates

What becomes of conversations under {count} chat templates, as TRL's package has them. A case is right if each answer
follows the ids that a server feeds before it (the template with its generation prompt, on the messages so far), has all
that the row says, and ends with a token at which the model stops. What a template cannot write is refused, row by row,
with what to do. `data.chat_template` names another template.

| case | messages |
|---|---|
| plain, system, turns | one question and answer; with a system message; two of them |
| tools, tools as text | a tool call, its result, an answer; arguments as an object, or as JSON text |
| beside a call, call alone | the same with text in the message that calls; a call as the last message, without tools |
| reasoning_content, thinking, reasoning | two answers with reasoning under that name |
| in content | reasoning as `<think>...</think>` at the start of the content |
"""
POWER = """\
Each mistake is planted in a tiny model, and the self-test before the first step (docs/method.md) is run. Of the models
above, in which nothing is planted, it refuses none. In bfloat16 rounding hides what changes an output by less than 3 %,
such as the last token of a window of some thousand tokens.
"""


def main() -> int:
    """Measure and write."""
    if not template_zoo.sources():
        raise SystemExit("the chat templates are those of TRL's package, which is not installed: make setup")
    if "--templates" in sys.argv:
        before, _, _ = PAGE.read_text(encoding="utf-8").partition("\n## Chat templates\n")
        parts = [before]
    else:
        parts = [INTRO.format(families=len(ALL), named=len(NAMED), more=len(MORE), longest=LONGEST)]
        for precision in PRECISIONS:
            parts += _section(precision, list(_rows(precision)))
        parts += _every()
        parts += planted_section()
    parts += [TEMPLATES.format(count=len(template_zoo.sources())), template_zoo.table()]
    PAGE.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")
    print(f"written: {PAGE.relative_to(ROOT)}")
    return 0


EVERY = "## Every other family"
OTHERS = """\
The other types of models in transformers' mapping of causal language models, and {seeing} that see, of which the
language model is trained. Their sizes follow from each family's own config, so that some fail where a published model
does not. In float32: {summary}.
"""


def _every() -> Iterator[str]:
    """The families that the zoo has no variant of."""
    rows = []
    for family in every.others():
        rows.append(every.row(family))
        print(f"{family}: {rows[-1].verdict}", file=sys.stderr, flush=True)
    yield EVERY
    yield OTHERS.format(seeing=len(every.SEEING), summary=table.summary(rows))
    yield table.table(rows)


def heading(precision: str) -> str:
    """The line above what is said of a precision."""
    return f"## {str(PRECISIONS[precision]).removeprefix('torch.')}"


def planted_section() -> list[str]:
    """What the self-test finds, which decides on what is trained."""
    return ["## What the self-test finds", POWER, planted.table(planted.MISTAKES)]


def _section(precision: str, rows: list[Row]) -> Iterator[str]:
    named = table.of_review(rows)
    others = [row for row in rows if row not in named]
    yield heading(precision)
    yield f"The variants of the review: {table.summary(named)}.\n\n{table.table(named)}"
    yield f"Others: {table.summary(others)}.\n\n{table.table(others)}"


def _rows(precision: str) -> Iterator[Row]:
    for variant in ALL.values():
        with tempfile.TemporaryDirectory() as folder:
            row = check(variant, precision, Path(folder))
        print(f"{precision} {row.name}: {row.verdict}", file=sys.stderr, flush=True)
        yield row


if __name__ == "__main__":
    sys.exit(main())
