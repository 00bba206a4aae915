"""`init hf://ORG/NAME` looks at the first rows of a data set of a hub before anything downloads it.

The hub is a stand-in on loopback, for the real client of huggingface_hub.
"""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
from pyarrow import parquet

from olora_ray.config.load import load_config
from pipelines import init


class Hub(BaseHTTPRequestHandler):
    """What is asked for the first rows of a data set: the tree of a branch, and ranges of a file."""

    content = b""
    sent: ClassVar[list[int]] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        body = b"{}"
        begin, end = 0, len(self.content)
        if "/tree/" in self.path:
            entry = {"type": "file", "oid": "0", "size": end, "path": "default/train/0000.parquet"}
            body = json.dumps([entry]).encode()
        elif "/resolve/" in self.path:
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if asked:
                begin, end = int(asked[1]), int(asked[2]) + 1
            body = self.content[begin:end]
            self.sent.append(len(body))
        elif "/revision/" in self.path:
            body = json.dumps({"id": "org/name", "sha": "0" * 40, "siblings": []}).encode()
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(self.content)}")
        self.send_header("ETag", "0")
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""


def looked_at(rows: int, folder: Path) -> subprocess.CompletedProcess[str]:
    lines = [
        {"question": f"Where is {n}?", "answer": f"Here {n}", "topic": "a"} for n in range(rows)
    ]
    parquet.write_table(pa.Table.from_pylist(lines), folder / "0000.parquet", row_group_size=1000)
    Hub.content = (folder / "0000.parquet").read_bytes()
    Hub.sent.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        hub = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "cache")}
        done = subprocess.run(
            [sys.executable, init.__file__, "hf://org/name", "--out", "hub.yaml"],
            env={**os.environ, **hub},
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        server.shutdown()
    return done


def test_the_first_rows_decide_and_the_rest_is_not_fetched(tmp_path: Path) -> None:
    done = looked_at(200_000, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "hf://org/name: its first 30 alpaca rows" in done.stdout
    assert load_config(str(tmp_path / "hub.yaml")).data.train[0].fields == {"topic": "none"}
    assert 0 < sum(Hub.sent) < len(Hub.content) / 2
