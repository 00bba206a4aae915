"""Templates that would take for ever, or all memory, are refused within seconds."""

from pathlib import Path
from typing import Any

import pytest

from olora_ray.common.errors import UserError
from olora_ray.data import template_trial
from olora_ray.data.tokenize import ExampleTokenizer
from olora_ray.tokens import prepare
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


def test_the_trial_does_not_import_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jinja2.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    template_trial.check("{{ 'another one' }}", {}, "tiny")


def test_a_template_is_tried_where_a_store_is_begun_and_in_no_task(tmp_path: Path, monkeypatch: Any) -> None:
    """A trial takes a process of its own, and there may be a thousand tasks' processes."""

    def job(source: str) -> tuple[prepare.StoreSpec, Any]:
        corpus = helpers.write_jsonl(tmp_path / "a.jsonl", helpers.rows(40))
        plan = prepare.plan_here(helpers.config(tmp_path, corpus), helpers.spec(source), "train")
        return prepare.StoreSpec(plan, str(tmp_path / "tokens"), str(tmp_path)), plan.part(0)

    hostile, _ = job("{{ 'a' * 3000000001 }}")
    with pytest.raises(UserError, match="takes more than 2 s or 1 GiB"):
        hostile.for_tasks()
    good, part = job(helpers.CHATML + "{# tried once, tools, arguments, tool_calls #}")
    shared = good.for_tasks()
    template_trial._comes_through.cache_clear()  # as in the process of a task
    monkeypatch.setattr(template_trial.subprocess, "run", lambda *_, **__: pytest.fail("tried again"))
    assert prepare.make_shard(shared, part)["examples"]
