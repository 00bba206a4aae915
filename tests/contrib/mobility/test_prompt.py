"""Training and serving ask by the same template; a question that is too long loses its oldest stays."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt import Form, Message, Template
from stays import Stay, When

from olora_ray.common.errors import UserError
from olora_ray.data.formats import to_example
from olora_ray.data.tokenize import ExampleTokenizer
from tests.tokens import helpers

PAST = [Stay(10 + i, i * 600, When(i % 7, (i * 431) % 1440), 15 * i) for i in range(60)]
WHEN = When(1, 12 * 60 + 5)


def user(messages: Sequence[Message]) -> str:
    return messages[1]["content"]


def test_the_forms_of_a_stay() -> None:
    past = [
        Stay(7, 0, When(0, 450), 40),
        Stay(12, 600, When(5, 0), 5),
        Stay(3, 900, When(6, 12 * 60), 9),
    ]

    def asked(form: Form, duration: bool = False) -> str:
        return user(Template(form, history=2, context=1, duration=duration).question(past, WHEN))

    assert (
        asked("short")
        == "<history>: Mon 07:30 7, Sat 00:00 12\n<context>: Sun 12:00 3\n<target>: Tue 12:05"
    )
    assert (
        asked("hours") == "<history>: Mon 7h 7, Sat 0h 12\n<context>: Sun 12h 3\n<target>: Tue 12h"
    )
    assert asked("tuple") == (
        "<history>: [('07:30 AM', 'Monday', 7), ('12:00 AM', 'Saturday', 12)]\n"
        "<context>: [('12:00 PM', 'Sunday', 3)]\n<target>: ('12:05 PM', 'Tuesday', <next_place>)"
    )
    assert "('07:30 AM', 'Monday', 40, 7)" in asked("tuple", duration=True)
    assert asked("tuple", duration=True).endswith(
        "<target>: ('12:05 PM', 'Tuesday', None, <next_place>)"
    )
    alone = user(Template("short", history=2, context=1).question(past[:1], WHEN))
    assert alone == "<history>: none\n<context>: Mon 07:30 7\n<target>: Tue 12:05"


@pytest.mark.parametrize("form", ["short", "hours", "tuple"])
def test_a_training_row_begins_with_the_tokens_of_the_served_question(form: Form) -> None:
    spec = helpers.spec()
    template = Template(form, 10, 3)
    messages = template.example(PAST, Stay(5, 10**6, WHEN))
    tokens = ExampleTokenizer(spec, 4096)(to_example("messages", {"messages": messages}, {}))[0]
    text = helpers.decode(tokens.ids)
    served = "".join(
        f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n"
        for m in template.question(PAST, WHEN)
    )
    assert text.startswith(served + '<|im_start|>assistant\n{"prediction": 5}')
    supervised = helpers.decode(tokens.ids[tokens.supervised])
    assert supervised == '{"prediction": 5}<|im_end|>'


@given(st.integers(0, 40), st.integers(1, 6), st.integers(1, 60), st.integers(0, 900))
def test_what_is_cut_is_the_oldest_and_as_little_as_needed(
    history: int, context: int, count: int, budget: int
) -> None:
    template = Template("hours", history, context)
    past = PAST[:count]

    def fits(messages: Sequence[Message]) -> bool:
        return len(user(messages)) <= budget

    places = [stay.place for stay in past]
    most = min(count, history + context)
    if not fits(template.question([], WHEN)):
        with pytest.raises(UserError, match=r"data\.max_length"):
            template.room(past, WHEN, fits)
        return
    shown = template.room(past, WHEN, fits)
    question = template.question(past, WHEN, fits)
    assert fits(question)
    assert question == template.question(past[count - shown :], WHEN)
    assert _places(user(question)) == places[count - shown :]
    assert user(question).endswith("<target>: Tue 12h")
    if shown < most:
        assert not fits(template.question(past[count - shown - 1 :], WHEN))


def _places(text: str) -> list[int]:
    stays = [stay for line in text.splitlines()[:2] for stay in line.partition(": ")[2].split(", ")]
    return [int(stay.rpartition(" ")[2]) for stay in stays if stay and stay != "none"]


def test_the_template_is_kept_for_a_server(tmp_path: Path) -> None:
    template = Template("tuple", 12, 4, duration=True)
    template.save(tmp_path / "template.json")
    assert Template.load(tmp_path / "template.json") == template
    (tmp_path / "template.json").write_text('{"shape": 3}')
    with pytest.raises(UserError, match="not a template for mobility"):
        Template.load(tmp_path / "template.json")
    with pytest.raises(
        UserError, match="argument --form: 'long' is unknown; use one of short, hours, tuple"
    ):
        Template("long")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--history, --context"):
        Template("short", 3, 0)
