"""A hub of models on loopback, for the real client of huggingface_hub: what a push asks for, and no more.

`repos` has the files of each repository; in place of weights, their SHA-256. A client with `variables()` in its
environment uses this hub and no other; the client of this process uses it while it runs.
"""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from huggingface_hub import constants

TOKEN = "hf_" + "c4n4ry" * 6


@dataclass
class Hub:
    url: str = ""
    role: str = "write"
    """The role of the token."""
    broken: str = ""
    """Requests with this in their path get status 403."""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    created: list[dict[str, Any]] = field(default_factory=list)
    commits: list[list[str]] = field(default_factory=list)
    """The paths that each commit wrote, and those that it deleted as `-path`."""
    requests: list[str] = field(default_factory=list)
    large: set[str] = field(default_factory=set)
    """SHA-256 of the contents that came through Git LFS."""
    xet: str = ""
    """A folder in which hf_xet keeps what it uploads."""

    def variables(self) -> dict[str, str]:
        off = {
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "0" if self.xet else "1",
            "NO_PROXY": "127.0.0.1",
        }
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, **off}

    def oid(self, name: str, content: bytes) -> str:
        if is_large(name):
            return content.decode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def user(self) -> dict[str, Any]:
        orgs = [{"name": "acme", "roleInOrg": "write"}, {"name": "guests", "roleInOrg": "read"}]
        return {
            "type": "user",
            "name": "ann",
            "orgs": orgs,
            "auth": {"accessToken": {"role": self.role}},
        }

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        """Return status and JSON for a request; `path` has no query."""
        words = path.strip("/").split("/")
        repo = "/".join(words[2:4])
        match words:
            case ["api", "whoami-v2"]:
                return 200, self.user()
            case ["api", "validate-yaml"]:
                return 200, {"errors": [], "warnings": []}
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                known = name in self.repos
                self.repos.setdefault(name, {".gitattributes": b""})
                self.created += [] if known else [asked]
                return 409 if known else 200, {"url": f"{self.url}/{name}"}
            case ["api", "models", _, _, "xet-write-token", "main"]:
                return 200, {"casUrl": f"local://{self.xet}", "accessToken": "x", "exp": 4102444800}
            case ["api", "models", _, _, "tree", "main"]:
                files = self.repos[repo].items()
                return 200, [
                    {"type": "file", "path": n, "size": len(c), "oid": self.oid(n, c)}
                    for n, c in files
                ]
            case ["api", "models", _, _, "revision", "main"]:
                return 200, {"id": repo, "sha": f"{len(self.commits):040}", "siblings": []}
            case ["api", "models", _, _, "preupload", "main"]:
                names = [each["path"] for each in json.loads(body)["files"]]
                return 200, {
                    "files": [self.known(name, self.repos[repo].get(name)) for name in names]
                }
            case [_, _, "info", "lfs", "objects", "batch"]:
                return 200, {"objects": [self.wanted(each) for each in json.loads(body)["objects"]]}
            case ["large", digest]:
                assert hashlib.sha256(body).hexdigest() == digest
                self.large.add(digest)
                return 200, {}
            case ["api", "models", _, _, "commit", "main"]:
                self.commit(self.repos[repo], [json.loads(line) for line in body.splitlines()])
                url = f"{self.url}/{repo}/commit/{len(self.commits)}"
                return 200, {"commitUrl": url, "commitOid": f"{len(self.commits):040}"}
        return 404, {"error": f"the stand-in does not know {path}"}

    def known(self, name: str, content: bytes | None) -> dict[str, Any]:
        mode = "lfs" if is_large(name) else "regular"
        oid = None if content is None else self.oid(name, content)
        return {"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def wanted(self, asked: dict[str, Any]) -> dict[str, Any]:
        actions = {"upload": {"href": f"{self.url}/large/{asked['oid']}"}}
        return {**asked, **({} if asked["oid"] in self.large else {"actions": actions})}

    def commit(self, files: dict[str, bytes], lines: list[dict[str, Any]]) -> None:
        done = []
        for line in lines[1:]:
            kind, value = line["key"], line["value"]
            name = value["path"]
            if kind == "deletedFile":
                del files[name]
            else:
                files[name] = (
                    base64.b64decode(value["content"]) if kind == "file" else value["oid"].encode()
                )
            done.append(f"-{name}" if kind == "deletedFile" else name)
        self.commits.append(done)


def is_large(name: str) -> bool:
    return name.endswith(".safetensors")


@contextlib.contextmanager
def running(xet: str = "") -> Iterator[Hub]:
    """Serve a hub for the block; with the folder `xet` the client uploads weights by hf_xet, else by Git LFS."""
    hub = Hub(xet=xet)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            path = self.path.partition("?")[0]
            hub.requests.append(path)
            if (
                not path.startswith("/large/")
                and self.headers["Authorization"] != f"Bearer {TOKEN}"
            ):
                status, content = 401, {"error": "Invalid username or password."}
            elif hub.broken and hub.broken in path:
                status, content = 403, {"error": "Private repository storage limit reached"}
            else:
                status, content = hub.answer(path, body)
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_POST = do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_TOKEN", TOKEN)
            # The client has read these from the environment at its import.
            patch.setattr(constants, "ENDPOINT", hub.url)
            patch.setattr(constants, "HF_HUB_OFFLINE", False)
            patch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
            yield hub
        server.shutdown()
