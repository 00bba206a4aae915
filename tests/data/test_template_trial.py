"""Templates that would take for ever, or all memory, are refused within seconds."""

import pytest

from olora_ray.common.errors import UserError
from olora_ray.data import template_trial
from olora_ray.data.tokenize import ExampleTokenizer
from tests.tokens import helpers


@pytest.mark.parametrize(
    "source",
    [
        "{{ 10 ** 300000000 }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 3000000000 }}",
        "{{ messages[0].content.center(2000000) }}",
    ],
)
def test_a_hostile_template_is_refused_in_one_line(source: str) -> None:
    with pytest.raises(
        UserError, match=r"^model.name: the chat template of tiny takes more than 2 s or 1 GiB"
    ) as caught:
        ExampleTokenizer(helpers.spec(source), 100)
    assert "\n" not in str(caught.value)


def test_a_template_that_raises_is_judged_by_rows_and_a_broken_one_when_it_is_compiled() -> None:
    template_trial.check("{{ raise_exception('no') }}", {}, "tiny")
    template_trial.check("{{ 1 / 0 }}", {}, "tiny")
    with pytest.raises(UserError, match="chat template of tiny is not valid: "):
        ExampleTokenizer(helpers.spec("{% for x in messages %}"), 100)


def test_the_trial_does_not_import_from_the_current_folder(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jinja2.py").write_text("raise SystemExit(9)")  # type: ignore[operator]
    monkeypatch.chdir(str(tmp_path))
    template_trial.check("{{ 'another one' }}", {}, "tiny")
