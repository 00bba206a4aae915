"""Write the quickstart corpus: customer messages, and the JSON that a model should answer.

    python pipelines/quickstart/make_corpus.py

Writes `train.jsonl` and `heldout.jsonl` beside this file, always with the same bytes. The two halves of
`vocabulary.json` share no product word, name, frame or phrase, so that a model cannot answer the held-out rows from
memory. A frame may contain choices, `[this|that]`, and fields in braces.
"""

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parent
SEED = 7
ROWS = {"train": 450, "heldout": 80}
INSTRUCTION = "Extract category, product, urgency and order as JSON."

MODEL_SHARE = 0.2
MODIFIER_SHARE = 0.6
ORDER_SHARE = 0.75
INLINE_ORDER_SHARE = 0.4
SILENT_LOW_SHARE = 0.3
CHATTER_SHARE = 0.2
LONG_SHARE = 0.05
GREETING_SHARE = 0.3
CLOSING_SHARE = 0.3
LOWER_CASE_SHARE = 0.12
TYPO_SHARE = 0.15

Row = dict[str, list[dict[str, str]]]


class Deck:
    """A deck that deals its cards in random order, and shuffles them again when all have been dealt."""

    def __init__(self, cards: Sequence[str], rng: random.Random) -> None:
        self._cards = tuple(cards)
        self._rng = rng
        self._left: list[str] = []

    def deal(self) -> str:
        """Return the next card, with its `[this|that]` choices made."""
        if not self._left:
            self._left = self._rng.sample(self._cards, len(self._cards))
        return re.sub(r"\[([^]]+)\]", self._choose, self._left.pop())

    def _choose(self, choices: re.Match[str]) -> str:
        options: list[str] = choices[1].split("|")
        return self._rng.choice(options)


@dataclass(frozen=True)
class Facts:
    category: str
    product: str
    urgency: str
    order: str | None

    def answer(self) -> str:
        return json.dumps(asdict(self))


class Writer:
    def __init__(self, half: str, seed: int = SEED) -> None:
        words = json.loads((HERE / "vocabulary.json").read_text(encoding="utf-8"))[half]
        self.rng = random.Random(f"{seed}/{half}")
        self.frames = {
            name: Deck(cards, self.rng) for name, cards in words.pop("categories").items()
        }
        self.decks = {name: Deck(cards, self.rng) for name, cards in words.items()}

    def rows(self, count: int) -> list[Row]:
        """Return `count` rows in random order, with every pair of category and urgency equally often."""
        pairs = [(category, urgency) for category in self.frames for urgency in ("high", "low")]
        rows = [self._row(*pairs[i % len(pairs)]) for i in range(count)]
        self.rng.shuffle(rows)
        return rows

    def _row(self, category: str, urgency: str) -> Row:
        facts = Facts(category, self._product(), urgency, self._order())
        text = self._message(facts)
        if self._happens(TYPO_SHARE):
            text = self._with_typo(text)
        if self._happens(LOWER_CASE_SHARE):
            text = text.lower()
        return chat(text.format(product=facts.product, order=facts.order), facts.answer())

    def _message(self, facts: Facts) -> str:
        body = list(self._body(facts))
        self.rng.shuffle(body)
        lines = [" ".join(body)]
        if self._happens(GREETING_SHARE):
            lines.insert(0, self._deal("greetings"))
        if self._happens(CLOSING_SHARE):
            lines.append(self._deal("closings"))
        return "\n".join(lines).replace("{name}", self._deal("names"))

    def _body(self, facts: Facts) -> Iterator[str]:
        mention = "{product}"
        if facts.order and self._happens(INLINE_ORDER_SHARE):
            mention = self._deal("order_inline")
        elif facts.order:
            yield self._deal("order_sentences")
        # `_row` fills in the fields in braces at the end, so that typos and lower case do not change them.
        yield self.frames[facts.category].deal().replace("{product}", mention)
        if facts.urgency == "high" or not self._happens(SILENT_LOW_SHARE):
            yield self._deal(facts.urgency)
        if self._happens(LONG_SHARE):
            for _ in range(3):
                yield self._deal("chatter")
        elif self._happens(CHATTER_SHARE):
            yield self._deal("chatter")

    def _product(self) -> str:
        words = [self._deal("brands")]
        if self._happens(MODIFIER_SHARE):
            words.append(self._deal("modifiers"))
        words.append(self._deal("nouns"))
        if self._happens(MODEL_SHARE):
            words.append(self._deal("models"))
        return " ".join(words)

    def _order(self) -> str | None:
        if not self._happens(ORDER_SHARE):
            return None
        pattern = self._deal("order_patterns").replace("A", "{A}").replace("0", "{0}")
        return re.sub(r"\{(.)\}", self._order_character, pattern)

    def _order_character(self, kind: re.Match[str]) -> str:
        return self.rng.choice("ABCDEFGHKLMNPRSTUVWXYZ" if kind[1] == "A" else "0123456789")

    def _with_typo(self, text: str) -> str:
        # The fields in braces stay as they are: they are filled in later.
        words = re.findall(r"(?<![{\w])[a-z]{5,}", text)
        if not words:
            return text
        word = self.rng.choice(words)
        at = self.rng.randrange(1, len(word) - 2)
        return text.replace(word, word[:at] + word[at + 1] + word[at] + word[at + 2 :], 1)

    def _deal(self, deck: str) -> str:
        return self.decks[deck].deal()

    def _happens(self, share: float) -> bool:
        return self.rng.random() < share


def chat(message: str, answer: str) -> Row:
    return {
        "messages": [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": message},
            {"role": "assistant", "content": answer},
        ]
    }


def corpus(half: str) -> str:
    return "".join(json.dumps(row) + "\n" for row in Writer(half).rows(ROWS[half]))


def main() -> None:
    for half in ROWS:
        (HERE / f"{half}.jsonl").write_text(corpus(half), encoding="utf-8")


if __name__ == "__main__":
    main()
