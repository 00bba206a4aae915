"""Notifications of a retraining's result, to a webhook and to a command (the config's notify section)."""

import json
import logging
import subprocess
import time
from datetime import UTC, datetime

import requests

from olora_ray.common import patience
from olora_ray.common.errors import UserError
from olora_ray.common.secrets import looked_up, mask
from olora_ray.config.schema import Config

logger = logging.getLogger(__name__)

SENT = "the event {!r} was sent"
"""Text of a log line: by it deploy/night.py knows what was told, also where the command runs elsewhere, as a job."""


def tell(config: Config, event: str, reason: str, version: str | None = None, champion: str | None = None) -> None:
    """Send an event to the config's webhook and command; on failure log a warning and raise nothing."""
    reason = " ".join(mask(reason).split())
    subject = f"version {version} " if version else ""
    message = {
        "event": event,
        "model": config.registry.model,
        "reason": reason,
        "version": version,
        "champion": champion,
        "run": config.run.name,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "text": f"{config.registry.model or config.run.name}: {subject}{event}: {reason}",
    }
    for field, value, send in (("url", config.notify.url, _post), ("command", config.notify.command, _run)):
        for pause in (1.0, 3.0, None) if value else ():  # seconds before the next try
            try:
                send(str(value), json.dumps(message))
                logger.info(f"notify.{field}: {SENT.format(event)}")
                break
            except Exception as error:  # a failed notification must not change the result of the retraining
                if pause is None or isinstance(error, UserError):
                    logger.warning(f"notify.{field}: the event {event!r} was not sent: {_failure_reason(error)}")
                    break
                time.sleep(pause)


def _post(url: str, body: str) -> None:
    patience.follow_certificates()
    headers = {"Content-Type": "application/json"}
    address = looked_up(url, "its address")
    requests.post(address, data=body, headers=headers, timeout=5.0).raise_for_status()


def _run(command: str, body: str) -> None:
    subprocess.run(["/bin/sh", "-c", command], input=body, text=True, timeout=30.0, check=True)


def _failure_reason(error: Exception) -> str:
    # Never the text of an error of requests: it contains the webhook's address, which is a secret.
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"HTTP status {error.response.status_code}"
    if isinstance(error, subprocess.CalledProcessError):
        return f"exit code {error.returncode}"
    return type(error).__name__
