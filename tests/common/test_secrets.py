"""Nothing that is shown or written has a password in it, and nothing else is hidden."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from olora_ray.common import secrets
from olora_ray.common.errors import UserError
from olora_ray.config.load import build, override
from olora_ray.tracking import client, run
from olora_ray.tracking.start import resolve_uri
from tests import tiny

HIDDEN = "c4n4ry"

SECRETS = [
    "http://ann:c4n4ry@host:5000/path",
    "https://:c4n4ry@host",
    "postgresql+psycopg2://ann:c4n4ry@db:5432/mlflow",
    "mysql://ann:1c4n4ry@x:y/z@db/mlflow",
    "s3://KEY:c4n4ry@bucket/data.jsonl",
    "s3://bucket/data.jsonl?secret_key=c4n4ry&region=here",
    "https://host/data.jsonl?X-Amz-Date=now&X-Amz-Signature=c4n4ry",
    "postgresql://db/mlflow?sslmode=on&password=c4n4ry",
    "https://host/v1?key=AIzac4n4ry" + "x" * 31,
]
FIELDS = [
    "Authorization: Bearer c4n4ry",
    "{'Authorization': 'Bearer c4n4ry', 'Accept': 'text/html'}",
    "curl -H 'Authorization: token c4n4ry' -H 'x-api-key: c4n4ry'",
    "Authorization: AWS4-HMAC-SHA256 Credential=c4n4ry/20260101/us-east-1, SignedHeaders=host, Signature=c4n4ry",
    "sent Bearer c4n4ry-c4n4ry-c4n4ry to the server",
    "password: c4n4ry",
    "the password: 'c4n4ry and more', as given",
    '{"password": "c4n4ry", "user": "ann"}',
    '"{\\"password\\": \\"c4n4ry\\"}"',
    '{"password": 1, "token":123, "secret": "c4n4ry"}',
    "Settings(user='ann', password='c4n4ry', hub_token='c4n4ry')",
    "x-api-key: c4n4ry",
    "apiKey=c4n4ry accessToken=c4n4ry",
    "AWS_SECRET_ACCESS_KEY=c4n4ry",
    "it is hf_c4n4ry" + "A" * 30,
    "AKIA" + "C4N4RY".ljust(16, "X"),
    "eyJc4n4ryc4n4ry.eyJc4n4ryc4n4ry.c4n4ry",
    "mlflow login --password c4n4ry --user ann",
    "run --api-key 'c4n4ry and more' --hub-token \"it's c4n4ry\"",
    "Command '['login', '--password', 'c4n4ry', '--verbose']' returned non-zero exit status 1",
    "curl -u ann:c4n4ry https://host",
    "+ curl --user ann:c4n4ry https://host && curl -uann:c4n4ry https://host",
    "Command '['curl', '-u', 'ann:c4n4ry', 'https://host']' returned non-zero exit status 22",
    'set-cookie: session="c4n4ry"; Path=/; HttpOnly; other=c4n4ry',
    "{'Set-Cookie': 'session=c4n4ry; Path=/', 'Server': 'x'}",
    '"{\\"Cookie\\": \\"session=c4n4ry; other=c4n4ry\\"}"',
    "curl -H 'Cookie: session=c4n4ry' https://host",
]
PLAIN = [
    "http://host:5000/#/models/support@champion",
    "gs://anonymous@bucket/data.jsonl?retry_limit_seconds=3",
    "postgresql://ann@db/mlflow",
    "sqlite:////data/a:b@c/mlflow.db",
    "hf://org/tokens?split=train&name=token",
    "abfs://container@account.dfs.core.windows.net/data",
    "evaluation.max_new_tokens=5 tokens=7, https://host and ann@host:3",
    'mlflow.set_tracking_uri("http://127.0.0.1:5000"); load_model("models:/support@champion")',
    "config: tracking.password: unknown field; delete it; secrets come from environment variables or files, never",
    "tracking.uri: env:MY_TOKEN: the environment variable MY_TOKEN is not set in this process",
    "tokens: train: 1,000 rows in 12 sequences, fill 97 %; supervised tokens: 5",
    "step 10/120  loss 1.2345  lr 3.0e-04  1,234 tok/s  grad 0.51  eta 1:02:03",
    "special tokens: eos_token=</s> bos_token: <s> 'pad_token': '<pad>', eos_token_id: 2",
    '"password": null, token: None, "secret": ""',
    "The secretary: a token of thanks. Forgot the password: click here! Its signature: none",
    "docker run --user 1000:1000; sort -u a:b; --max-new-tokens 5 --token --tokenizer x",
    "A cookie: a small cake. Cookies: 5",
    "digest e7f837015eb5be4e, eyJ of no meaning, hf_hub, sk-learn, AKIAS and the bearer of news",
]


@pytest.mark.parametrize("uri", SECRETS)
def test_a_secret_is_found_and_masked(uri: str) -> None:
    assert secrets.in_uri(uri)
    for text in (uri, f"cannot read '{uri}': no", f"{uri} and {uri}"):
        masked = secrets.mask(text)
        assert HIDDEN not in masked
        assert "***" in masked
        assert secrets.mask(masked) == masked
    assert not secrets.in_uri(secrets.mask(uri))


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_no_secret_is_left_alone(text: str) -> None:
    assert secrets.mask(text) == text
    assert not secrets.in_uri(text)


@pytest.mark.parametrize("text", FIELDS)
def test_a_secret_behind_its_name_is_masked(text: str) -> None:
    masked = secrets.mask(text)
    assert HIDDEN not in masked.lower()
    assert "***" in masked
    assert secrets.mask(masked) == masked


def test_what_stands_around_a_secret_stays() -> None:
    for line in (
        "login --password c4n4ry --user ann",
        "login --password 'c4n4ry' --user ann",
        "['login', '--password', 'c4n4ry', '--verbose']",
        "curl -u ann:c4n4ry https://host",
        "curl -H 'Cookie: c4n4ry' https://host",
        "{'Set-Cookie': 'c4n4ry', 'Server': 'x'}",
        '{"user": "ann", "password": "c4n4ry", "port": 5}; x-api-key: c4n4ry, password=c4n4ry&region=here',
    ):
        cookie = line.replace("c4n4ry", "session=c4n4ry; Path=/") if "ookie" in line else line
        assert secrets.mask(cookie) == line.replace("c4n4ry", "***")


@given(
    st.text("abc=:/@?&.-_ '\"\\\n", max_size=60),
    st.lists(st.sampled_from([*SECRETS, *FIELDS, *PLAIN]), max_size=4),
)
def test_what_is_masked_is_masked_at_once(noise: str, parts: list[str]) -> None:
    masked = secrets.mask(noise.join(parts) + noise)
    assert secrets.mask(masked) == masked


@pytest.mark.parametrize("uri", SECRETS)
@pytest.mark.parametrize(
    "field", ["tracking.uri", "run.storage", "model.name", "data.train.0.path", "adapter.targets"]
)
def test_a_config_with_a_secret_is_refused_without_repeating_it(field: str, uri: str) -> None:
    with pytest.raises(UserError) as caught:
        override(
            tiny.config(), {field: [uri] if field == "adapter.targets" else uri, "adapter.rank": 0}
        )
    message = str(caught.value)
    assert HIDDEN not in message
    assert f" problems: {field}: the address contains a secret; " in message
    assert any(
        way in message for way in ("MLFLOW_TRACKING_PASSWORD", "env:NAME", "AWS_SECRET_ACCESS_KEY")
    )
    assert "adapter.rank" in message  # all problems are told together


@pytest.mark.parametrize(
    "tree",
    [
        {"tracking": "http://ann:c4n4ry@host"},
        {"adapter": {"rank": "http://ann:c4n4ry@host"}},
        {"adapter": {"targets": {"password": HIDDEN}}},
        {"adapter": {"targets": [{"password": HIDDEN}]}},
        {"tracking": {"password": HIDDEN}},
        {"cluster": {"workers": "http://ann:c4n4ry@host"}},
        {"http://ann:c4n4ry@host": {"x": 1}},
    ],
    ids=str,
)
def test_a_wrong_value_is_not_repeated_with_its_secret(tree: dict[str, object]) -> None:
    with pytest.raises(UserError) as caught:
        build(
            {
                "run": {"name": "a"},
                "model": {"name": "m"},
                "data": {"train": [{"path": "a"}]},
                **tree,
            }
        )
    assert HIDDEN not in str(caught.value)


def test_an_address_may_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = "postgresql://ann:c4n4ry@db/mlflow"
    (tmp_path / "uri").write_text(address + "\n")
    monkeypatch.setenv("OUR_MLFLOW", address)
    for named in ("env:OUR_MLFLOW", f"file:{tmp_path}/uri"):
        config = tiny.config(tracking__uri=named)
        assert resolve_uri(config) == address
        assert config.tracking.uri == named
    assert client.shown_uri(address) == "postgresql://ann:***@db/mlflow"


@pytest.mark.parametrize(
    ("named", "problem"),
    [
        ("env:NOT_SET", "the environment variable NOT_SET is not set in this process"),
        ("file:/no/such/file", "cannot be read: No such file"),
        ("file:uri", "absolute path"),
        ("file:{folder}/two", "expected one line with an address, found 2 words"),
        ("file:{folder}/bytes", "not UTF-8"),
    ],
)
def test_a_name_that_leads_nowhere_is_explained(named: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "two").write_text(f"http://host\n{HIDDEN}\n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError) as caught:
        resolve_uri(tiny.config(tracking__uri=named.format(folder=tmp_path)))
    message = str(caught.value)
    assert message.startswith("tracking.uri: ")
    assert problem in message
    assert HIDDEN not in message


SCRIPT = """
import logging
from olora_ray.config import command_line
from olora_ray.common.errors import UserError

def main(argv):
    logging.getLogger("olora_ray.test").info("said http://ann:c4n4ry@host")
    logging.getLogger("library").warning("logged %s", "http://ann:c4n4ry@host")
    raise {kind}("raised http://ann:c4n4ry@host")

command_line.run(main)
"""


@pytest.mark.parametrize(("kind", "code"), [("UserError", 2), ("ValueError", 1)])
def test_an_entry_script_prints_no_secret(kind: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.format(kind=kind))
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code
    output = done.stdout + done.stderr
    assert all(f"{word} http://ann:***@host" in output for word in ("said", "logged", "raised"))
    assert ("Traceback" in output) == (kind == "ValueError")
    assert HIDDEN not in output


def test_the_write_queue_logs_no_password(caplog: pytest.LogCaptureFixture) -> None:
    uri = "http://ann:c4n4ry@127.0.0.1:9"
    tracker = run.Tracker(uri, "run")
    with caplog.at_level(logging.WARNING):
        tracker.tags({"a": "b"})
        assert not tracker.flush(3)
        with pytest.raises(client.TrackingUnavailable) as caught:
            tracker.end(seconds=0.1)
    assert "MLflow does not answer" in caplog.text
    assert HIDDEN not in caplog.text + str(caught.value)
