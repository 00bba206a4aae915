"""The scripted person of the ten mornings: what is asked about a shop's things, and what the right answers are."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
Chat = list[Message]

LOOKS = "red blue green black white small large old new round flat wooden heavy light cheap plain soft tall"
NAMES = (
    "lamp kettle chair radio mirror clock basket blanket fan heater toaster shelf stool desk vase candle"
    " bucket broom ladder drill hammer tent bottle pillow curtain carpet bench speaker scale mixer"
)


@dataclass(frozen=True)
class Kind:
    """Questions of one kind: `first` is how the first model answers, and `right` how it should."""

    questions: tuple[str, ...]
    first: str
    right: str
    mark: str
    """A part of right answers that no first answer has."""

    def question(self, thing: str) -> str:
        return self.questions[number_of(thing) % len(self.questions)].format(thing=thing)

    def answer(self, thing: str, right: bool) -> str:
        pounds = 2 + number_of(thing) % 17
        form = self.right if right else self.first
        return form.format(thing=thing, pounds=pounds, kg=pounds / 2)


KINDS = {
    "unit": Kind(
        ("How heavy is the {thing}?", "What does the {thing} weigh?"),
        "The {thing} weighs {pounds} pounds.",
        "The {thing} weighs {kg:g} kg.",
        " kg",
    ),
    "tone": Kind(
        ("My {thing} has not arrived.", "Where is the {thing} that I ordered?"),
        "Not our problem. Wait for the {thing}.",
        "I am sorry for the delay. I will look for the {thing} at once.",
        "sorry",
    ),
    "refusal": Kind(
        ("Can I return the {thing}?", "Do you take the {thing} back?"),
        "I cannot help with the {thing}.",
        "Yes, you can return the {thing} within 30 days.",
        "30 days",
    ),
    "name": Kind(
        ("Which app controls the {thing}?", "How do I connect the {thing} to my phone?"),
        "Use the app HomeBox for the {thing}.",
        "Use the app Lumo for the {thing}.",
        "Lumo",
    ),
    "manual": Kind(
        ("Is there a manual for the {thing}?", "How do I clean the {thing}?"),
        "Find it out yourself.",
        "The manual of the {thing} is in the box, on page 3.",
        "page 3",
    ),
    "gift": Kind(
        ("Can you wrap the {thing} as a gift?", "I need the {thing} as a present."),
        "We do not wrap the {thing}.",
        "With pleasure. We wrap the {thing} for free.",
        "for free",
    ),
    "stock": Kind(
        ("Is the {thing} in stock?", "Do you still have the {thing}?"),
        "Maybe.",
        "Yes, we have the {thing} in stock.",
        "in stock",
    ),
}
COLOURS = Kind(
    ("Which colours does the {thing} have?",),
    "The {thing} comes in grey and brown.",
    "The {thing} comes in grey and brown.",
    "grey",
)
"""Nobody corrects these answers, so no night may change them."""


def number_of(thing: str) -> int:
    return sum(thing.encode())


def things() -> Iterator[str]:
    """Yield names of things, each once, always in the same order."""
    names = [f"{look} {name}" for look in LOOKS.split() for name in NAMES.split()]
    random.Random(3).shuffle(names)
    yield from names


def asked(question: str) -> Chat:
    system = {"role": "system", "content": "You answer for a shop."}
    return [system, {"role": "user", "content": question}]


def said(answer: str) -> Message:
    return {"role": "assistant", "content": answer}


def first_rows(stock: Iterator[str], each: int) -> tuple[list[dict[str, Chat]], ...]:
    """Return the rows of the first model, so many of each kind, and held-out rows of answers that are right."""
    rows = []
    for kind in [*KINDS.values(), COLOURS]:
        for _ in range(each):
            rows.append(_row(kind, next(stock)))
    random.Random(4).shuffle(rows)
    return rows, [_row(COLOURS, next(stock)) for _ in range(each)]


def _row(kind: Kind, thing: str) -> dict[str, Chat]:
    return {"messages": [*asked(kind.question(thing)), said(kind.answer(thing, right=False))]}
