"""A stand-in for the metadata service of a cloud.

A file FOLDER/notice takes the node away. FOLDER/asked gets the requests that end the machine.
"""

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SPOT = '{"action": "terminate", "time": "2026-11-30T12:00:00Z"}'
EVENT = (
    '{"DocumentIncarnation": 1, "Events": [{"EventType": "Preempt", "EventStatus": "Scheduled"}]}'
)
EC2 = {"GET /latest/meta-data/instance-id": "i-1", "PUT /latest/api/token": "secret"}
GCE = {"GET /computeMetadata/v1/instance/id": "1"}
AZURE = {
    "GET /metadata/instance": "{}",
    "GET /metadata/instance/compute/resourceId": "/subscriptions/s/virtualMachines/node",
    "GET /metadata/identity/oauth2/token": '{"access_token":"secret","token_type":"Bearer"}',
    "POST /subscriptions/s/virtualMachines/node/deallocate": "{}",
}
# What each service has at the node's notice; without one EC2 has no such page, and the others say so.
NOTICES = {
    "ec2": {"GET /latest/meta-data/spot/instance-action": (None, SPOT)},
    "gce": {"GET /computeMetadata/v1/instance/preempted": ("FALSE", "TRUE")},
    "azure": {"GET /metadata/scheduledevents": ('{"Events": []}', EVENT)},
}
PAGES = {"ec2": EC2, "gce": GCE, "azure": AZURE}
HEADERS = {
    "ec2": ("X-aws-ec2-metadata-token", "secret"),
    "gce": ("Metadata-Flavor", "Google"),
    "azure": ("Metadata", "true"),
}


def serve(cloud: str, port: int, folder: Path) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            name = f"{self.command} {self.path.partition('?')[0]}"
            notices = NOTICES[cloud]
            text = (
                notices[name][(folder / "notice").exists()]
                if name in notices
                else PAGES[cloud].get(name)
            )
            header, value = (
                HEADERS[cloud] if self.command == "GET" else ("Host", self.headers["Host"])
            )
            if self.command == "POST":
                (folder / "asked").write_text(f"{name} {self.headers['Authorization']}")
            code = 404 if text is None else 200 if self.headers[header] == value else 401
            self.send_response(code)
            self.end_headers()
            self.wfile.write((text or "").encode())

        do_GET = do_PUT = do_POST = answer

        def log_message(self, *words: object) -> None: ...

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)
