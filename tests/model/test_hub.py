"""The reasons why the hub does not deliver a model, from a local server that answers like the hub."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects

from olora_ray.common.errors import TryAgain, UserError
from olora_ray.model.source import obtain
from tests import tiny

COMMIT = "0" * 40
ANSWERS = {
    "none": (
        404,
        "RepoNotFound",
        "the model hub has no model of this name, or it is private: correct the name",
    ),
    "unauthorised": (
        401,
        "",
        "the model hub has no model of this name, or it is private: correct the name",
    ),
    "gated": (403, "GatedRepo", "access to it on request"),
    "revision": (
        404,
        "RevisionNotFound",
        "the model hub has the model, but not this model.revision",
    ),
    "broken": (500, "", "the model hub is unreachable (Server error '500"),
    "busy": (429, "", "the model hub is unreachable ("),
}
# Failures that another start may not meet.
PASS = ("broken", "busy")


class Hub(BaseHTTPRequestHandler):
    """Answers by the name of the model."""

    def do_GET(self) -> None:
        """Send one of ANSWERS, or a model with a file of which only half arrives."""
        if "/org/cut" in self.path:
            self.cut_off()
            return
        status, code, _ = next(
            answer for name, answer in ANSWERS.items() if f"/org/{name}" in self.path
        )
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def cut_off(self) -> None:
        """Announce the whole content, then break off."""
        if "/api/" in self.path:
            content, length = json.dumps(self.what_there_is()).encode(), None
        else:
            content, length = b"half of it", 20
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", '"1234"')
        self.send_header("Content-Length", str(length or len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)
        self.close_connection = True

    def what_there_is(self) -> object:
        """One file, in the form of both lists of the hub."""
        if "/tree/" in self.path:
            return [{"type": "file", "path": "config.json", "size": 20, "oid": "1234"}]
        return {"id": "org/cut", "sha": COMMIT, "siblings": [{"rfilename": "config.json"}]}

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`told(ENDPOINT=...)` sets what the hub's client has read from the environment."""

    def set_constants(**changes: object) -> None:
        for name, value in changes.items():
            monkeypatch.setattr(constants, name, value)

    set_constants(HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE=False)
    return set_constants


def refusal(name: str, passes: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        obtain(tiny.config(model__name=name))
    assert isinstance(caught.value, TryAgain) == passes
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"model.name: {name}: not a folder here: ")
    return message


@pytest.mark.parametrize("name", ANSWERS)
def test_what_the_hub_answers_is_told_in_words(
    name: str, address: str, told: Callable[..., None]
) -> None:
    told(ENDPOINT=address)
    assert ANSWERS[name][2] in refusal(f"org/{name}", passes=name in PASS)


def test_a_file_that_breaks_off_is_no_bug(
    address: str, told: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The client's own exception ended in a traceback.
    told(
        ENDPOINT=address,
        HUGGINGFACE_CO_URL_TEMPLATE=address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(time, "sleep", lambda _: None)  # before its client asks again
    assert "the model hub did not deliver it: " in refusal("org/cut", passes=True)


def test_weights_in_folders_of_a_repository_are_left_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "additional_chat_templates/tools.jinja",
    ]
    wanted += ["README.md"]  # it has the license
    left = [
        "original/model.safetensors",
        "onnx/pytorch_model.bin",
        "consolidated.safetensors",
        "pytorch_model.bin",
    ]
    taken: list[str] = []
    tiny.llama().save_pretrained(tmp_path)

    def download(name: str, revision: str | None, **patterns: list[str]) -> str:
        taken.extend(filter_repo_objects([*wanted, *left], **patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert obtain(tiny.config(model__name="org/model")).folder == str(tmp_path)
    assert taken == wanted


def test_a_hub_that_cannot_be_asked_is_no_wrong_name(told: Callable[..., None]) -> None:
    told(ENDPOINT="http://127.0.0.1:9")
    message = refusal("org/none", passes=True)
    assert "the model hub is unreachable (" in message
    assert "and this machine's cache does not have the model" in message


def test_a_machine_that_is_told_to_stay_offline_says_so(
    address: str, told: Callable[..., None]
) -> None:
    told(ENDPOINT=address, HF_HUB_OFFLINE=True)
    assert "HF_HUB_OFFLINE" in refusal("org/none")
