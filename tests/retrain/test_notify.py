"""A webhook and a command get the result of a retraining; through the entry script, without a training."""

import json
import logging
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from olora_ray.common.errors import UserError
from olora_ray.config.load import load_config
from olora_ray.config.schema import Config
from olora_ray.retrain import notify, recipe
from olora_ray.retrain.decision_run import RECORDED
from olora_ray.retrain.recipe import AGAINST
from olora_ray.tracking.checksums import GATE, JUDGED, TAG
from olora_ray.tracking.client import connect
from pipelines import retrain
from tests import mlflow_database, tiny
from tests.receiver import receiver
from tests.refused import refused
from tests.retrain.nightly import Nightly


@pytest.fixture
def nightly(folder: Path, model: Path) -> Nightly:
    mlflow_database.place(folder / "runs")
    return Nightly(folder, model)


@pytest.mark.parametrize(("event", "verdict"), [("promoted", "passed"), ("refused", "refused")])
def test_a_decision_is_told_once_with_its_version(
    nightly: Nightly, event: str, verdict: str
) -> None:
    client = connect(nightly.aliases.uri)
    client.create_registered_model("nightly")
    found = recipe.read_inputs(load_config(nightly.config))
    assert found.config.data.train[0].format == "messages", "what the config leaves open"
    now = found.fingerprint
    # The state after an interruption between the gate's decision and its record.
    tags = {**now.tags(), GATE: f"{verdict}: eval/loss 0.5", AGAINST: ""}
    client.create_model_version("nightly", "/nowhere", tags=tags)
    if event == "promoted":
        client.set_registered_model_alias("nightly", "champion", "1")
    file = nightly.folder / "told.json"
    script = Path(__file__).parents[2] / "pipelines" / "retrain.py"
    words = [sys.executable, script, nightly.config, "notify.command=kill -KILL $PPID"]
    assert (
        subprocess.run(words, check=False).returncode == -signal.SIGKILL
    )  # the call is killed before it has told
    for _ in range(2):  # the second call finds no change and sends nothing
        retrain.main([str(nightly.config), f"notify.command=cat >>{file}"])
    message = json.loads(file.read_text())
    assert datetime.fromisoformat(message.pop("time")).tzinfo
    assert message == {
        "event": event,
        "model": "nightly",
        "reason": "eval/loss 0.5",
        "version": "1",
        "champion": None,
        "run": load_config(nightly.config).run.name,
        "text": f"nightly: version 1 {event}: eval/loss 0.5",
    }


def test_a_champion_that_was_changed_is_told_once_and_ends_each_call(
    nightly: Nightly, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect(nightly.aliases.uri)
    client.create_registered_model("nightly")
    tags = {GATE: "passed: eval/loss 0.5", AGAINST: "", RECORDED: "run", JUDGED: "a", TAG: "b"}
    now = recipe.read_inputs(load_config(nightly.config)).fingerprint
    client.create_model_version("nightly", "/nowhere", tags={**now.tags(), **tags})
    client.set_registered_model_alias("nightly", "champion", "1")
    with receiver() as hook:
        monkeypatch.setenv("HOOK", hook.url)
        for _ in range(2):
            with refused("nightly version 1 was changed after its verdict"):
                retrain.main([str(nightly.config), "notify.url=env:HOOK"])
    assert hook.events() == ["changed", "failed", "failed"]
    assert hook.got[0]["version"] == "1"


def test_a_failure_is_told_also_without_mlflow(
    nightly: Nightly, monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiver() as hook:
        monkeypatch.setenv("HOOK", hook.url)
        with pytest.raises(UserError):
            retrain.main([str(nightly.config), "notify.url=env:HOOK", "tracking.uri=nonsense://"])
    assert hook.events() == ["failed"]
    assert hook.got[0]["reason"].startswith("tracking.uri=nonsense://")


def told(config: Config, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings of a notification."""
    with caplog.at_level(logging.WARNING, logger="olora_ray"):
        notify.tell(
            config, "failed", "tracking.uri=postgresql://user:pa55word@server/db: no\nanswer"
        )
    return [record.getMessage() for record in caplog.records]


def test_a_command_gets_the_same_on_its_standard_input(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, address = tmp_path / "got.json", tmp_path / "address"
    with receiver() as hook:
        address.write_text(hook.url)
        config = tiny.config(notify__command=f"cat >{file}", notify__url=f"file:{address}")
        assert told(config, caplog) == []
    assert [json.loads(file.read_text())] == hook.got
    assert hook.got[0]["text"].endswith(
        ": failed: tracking.uri=postgresql://user:***@server/db: no answer"
    )


def test_a_webhook_that_refuses_is_one_warning_without_its_address(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with receiver(status=500) as hook:
        monkeypatch.setenv("NOTIFY_URL", hook.url)
        (line,) = told(tiny.config(notify__url="env:NOTIFY_URL", notify__command="exit 3"), caplog)[
            :1
        ]
    assert hook.events() == ["failed"] * 3
    assert line == "notify.url: the event 'failed' was not sent: HTTP status 500"
    assert caplog.messages[1:] == ["notify.command: the event 'failed' was not sent: exit code 3"]


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("http://127.0.0.1:1/hook/s3cr3tOfTheHook", "ConnectionError"),
        ("s3cr3tOfTheHook", "MissingSchema"),
        ("", "its address: env:NOTIFY_URL"),
    ],
)
def test_a_webhook_that_is_not_there_is_one_warning_without_its_address(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, address: str, why: str
) -> None:
    monkeypatch.setenv("NOTIFY_URL", address)
    (line,) = told(tiny.config(notify__url="env:NOTIFY_URL"), caplog)
    assert line.startswith(f"notify.url: the event 'failed' was not sent: {why}")


ADDRESSES = [
    "https://chat.googleapis.com/v1/spaces/A/messages?key=AIzac4n4ry",
    "https://user:c4n4ry@hooks.example.com",
    "hooks.example.com/c4n4ry",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_config_has_no_address_of_a_webhook(address: str) -> None:
    with pytest.raises(UserError) as caught:
        tiny.config(notify__url=address)
    assert str(caught.value).startswith("config: notify.url: an address is a secret")
    if "://" in address:
        with pytest.raises(UserError) as caught:
            tiny.config(notify__command=f"curl -d @- {address}")
        assert str(caught.value).startswith("config: notify.command: an address may be a secret")
    assert "c4n4ry" not in str(caught.value)
