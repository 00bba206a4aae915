"""The question about a person's next place: one template for training and for serving.

    system  <the task, and the form of the answer>
    user    <history>: Mon 07:30 12, Mon 12:15 4, ...
            <context>: Tue 09:00 7, ...
            <target>: Tue 12:10

History and context are the latest stays before the target. A question that is too long loses its oldest stays, at the
left, and never its end. `rows.py` writes the training rows with `example`: the question and the answer. A server calls
`question` with the same settings. A training row may have further turns, each with a <target> alone: the next stay.
"""

import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import answer
from stays import DAYS, LARGEST_PLACE, Stay, When

from olora_ray.common.errors import UserError, first_line
from olora_ray.data.formats.format import Chat, Rejected
from olora_ray.data.tokenize import ExampleTokenizer
from olora_ray.data.tokenizer_spec import TokenizerSpec

Form = Literal["short", "hours", "tuple"]
FORMS: dict[str, str] = {
    "short": "Mon 07:30 12",
    "hours": "Mon 7h 12",
    "tuple": "('07:30 AM', 'Monday', 12), with the minutes of the stay before the place where they are known",
}
TASK = (
    "Predict the next place of a person. <history> has earlier stays, <context> the latest, each as {stay}, oldest"
    ' first. Answer for the time in <target> with one JSON object: {{"prediction": place}}'
)
SHORT = {"short": "weekday, time, place", "hours": "weekday, hour, place"}
TUPLES = {False: "(time, weekday, place)", True: "(time, weekday, minutes, place)"}
Message = dict[str, str]
Fits = Callable[[Sequence[Message]], bool]
"""True if a question with its answer fits in a model's sequence."""


@dataclass(frozen=True)
class Template:
    """The settings that turn the stays before a target into a question."""

    form: Form = "short"
    history: int = 40
    """Largest number of stays in the history."""
    context: int = 5
    """Number of stays in the context, the latest ones."""
    duration: bool = False
    """True if stays of the form `tuple` include their minutes."""

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise UserError(
                f"argument --form: {self.form!r} is unknown; use one of {', '.join(FORMS)}"
            )
        if self.history < 0 or self.context < 1:
            raise UserError(
                "arguments --history, --context: set --history to 0 or more, and --context to 1 or more"
            )

    def question(self, past: Sequence[Stay], when: When, fits: Fits | None = None) -> list[Message]:
        """Return the messages that ask for the place of a stay at `when`, after the stays `past`, oldest first.

        With `fits` the oldest stays are left out until it is True. Raises UserError if it is False without any stay.
        """
        return self._messages(past[len(past) - self.room(past, when, fits) :], when)

    def room(
        self,
        past: Sequence[Stay],
        when: When,
        fits: Fits | None = None,
        rest: Sequence[Message] = (),
    ) -> int:
        """Return the number of stays, the latest of `past`, that the question shows; raises UserError like `question`.

        With `rest` these messages must fit after the question too.
        """
        shown = min(len(past), self.history + self.context)

        def fit(count: int) -> bool:
            return fits is None or fits([*self._messages(past[len(past) - count :], when), *rest])

        if fit(shown):
            return shown
        # If some stays do not fit, more stays do not fit either.
        fitting = bisect_left(range(shown), True, key=lambda count: not fit(count))
        if not fitting:
            raise UserError(
                "data.max_length: too small for a question without any stay; set it higher"
            )
        return fitting - 1

    def example(
        self, past: Sequence[Stay], *targets: Stay, fits: Fits | None = None
    ) -> list[Message]:
        """Return the question about the first of `targets` and its answer, then the others, each in its own turn."""
        rest = self.turns(targets)
        shown = self.room(past, targets[0].when, fits, rest[:-1])
        return [*self._messages(past[len(past) - shown :], targets[0].when), *rest]

    def turns(self, targets: Sequence[Stay]) -> list[Message]:
        """Return the messages after the question: the answer, then questions and answers for the other targets."""
        messages: list[Message] = []
        for target in targets:
            if messages:
                messages.append(
                    {"role": "user", "content": f"<target>: {self._target(target.when)}"}
                )
            messages.append({"role": "assistant", "content": answer.write(target.place)})
        return messages

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: Path) -> "Template":
        """Read a file of `save`; raises UserError for another file."""
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{file}: not a template for mobility: {first_line(error)}") from None

    def _messages(self, kept: Sequence[Stay], when: When) -> list[Message]:
        split = max(0, len(kept) - self.context)
        earlier, latest = (self._stays(part) for part in (kept[:split], kept[split:]))
        form = SHORT.get(self.form) or TUPLES[self.duration]
        lines = f"<history>: {earlier}\n<context>: {latest}\n<target>: {self._target(when)}"
        return [
            {"role": "system", "content": TASK.format(stay=form)},
            {"role": "user", "content": lines},
        ]

    def _stays(self, stays: Sequence[Stay]) -> str:
        if self.form == "tuple":
            return f"[{', '.join(self._tuple(stay) for stay in stays)}]"
        return ", ".join(f"{self._time(stay.when)} {stay.place}" for stay in stays) or "none"

    def _time(self, when: When) -> str:
        hour, minute = divmod(when.minute, 60)
        return f"{DAYS[when.weekday][:3]} " + (
            f"{hour}h" if self.form == "hours" else f"{hour:02d}:{minute:02d}"
        )

    def _tuple(self, stay: Stay) -> str:
        minutes = f"{stay.duration}, " if self.duration else ""
        return f"({_clock(stay.when)}, {minutes}{stay.place})"

    def _target(self, when: When) -> str:
        if self.form != "tuple":
            return self._time(when)
        return f"({_clock(when)}, {'None, ' if self.duration else ''}<next_place>)"


def _clock(when: When) -> str:
    hour, minute = divmod(when.minute, 60)
    return f"'{(hour + 11) % 12 + 1:02d}:{minute:02d} {'PM' if hour >= 12 else 'AM'}', '{DAYS[when.weekday]}'"


def fits(spec: TokenizerSpec, max_length: int) -> Fits:
    """Return the test that a question and the longest answer have at most `max_length` tokens.

    Tokenizer and chat template are those of training. A server does not know the real answer, so the longest one takes
    its place: training and serving then show the same stays. The test raises UserError for questions that the tokenizer
    or its chat template refuses.
    """
    tokenize = ExampleTokenizer(spec, max_length)
    last = {"role": "assistant", "content": answer.write(LARGEST_PLACE)}

    def fit(question: Sequence[Message]) -> bool:
        try:
            tokenize(Chat((*question, last)))
        except Rejected as rejected:
            if rejected.reason != "too_long":
                raise UserError(
                    f"model.name: {spec.name} cannot be asked: {rejected.message}"
                ) from None
            return False
        return True

    return fit
