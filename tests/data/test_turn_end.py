"""What ends an answer in chats is found by rendering one."""

import pytest

from olora_ray.data.tokenize import turn_end
from tests.data.test_chat_template import MISTRAL
from tests.tokens import helpers

TWO_ENDS = "{% for m in messages %}{{ m.content + '<|im_end|>\n' }}{% endfor %}{{ eos_token }}"
"""As Phi-3's."""
NO_END = "{% for m in messages %}{{ m.content + '\n\n' }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "end"),
    [(helpers.CHATML, 4), (MISTRAL, 2), (TWO_ENDS, 4), (NO_END, None), ("{{ raise_exception('no') }}", None)],
)
def test_the_token_with_which_a_template_ends_an_answer(template: str, end: int | None) -> None:
    assert turn_end(helpers.spec(template)) == end
