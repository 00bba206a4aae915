"""Notifications of a retraining's result, to a webhook and to a command (the config's notify section), and its pings.

A ping tells a service elsewhere that a night has begun or ended (retrain.ping). The service alarms when a ping is
missing, so it also hears of a machine that is off. Only deploy/night.py pings, because only the parent of a retraining
knows how it ended, and two callers would end each other's nights.
"""

import json
import logging
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial

import requests

from olora_ray.common import outcome, retry
from olora_ray.common.errors import UserError
from olora_ray.common.secrets import looked_up, mask
from olora_ray.config.schema import Config

logger = logging.getLogger(__name__)


def tell(
    config: Config, event: str, reason: str, version: str | None = None, champion: str | None = None
) -> None:
    """Send an event to the config's webhook and command; on failure log a warning and raise nothing."""
    reason = " ".join(mask(reason).split())
    name = config.registry.model or config.run.name
    subject = f"version {version} " if version else ""
    message = {
        "event": event,
        "model": config.registry.model,
        "reason": reason,
        "version": version,
        "champion": champion,
        "run": config.run.name,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "text": f"{name}: {subject}{event}: {reason}",
    }
    outcome.tell(reason=message["text"])
    body = json.dumps(message)
    for field, value, send in (
        ("url", config.notify.url, _post),
        ("command", config.notify.command, _run),
    ):
        if value and _sent(f"notify.{field}", f"the event {event!r}", partial(send, value, body)):
            logger.info(f"notify.{field}: the event {event!r} was sent")
            outcome.tell(sent=event)


def ping(config: Config, signal: str, text: str = "") -> None:
    """Call the config's retrain.ping: `signal` is /start, empty for a good end, or /fail. Never raises, as `tell`."""
    reference = config.retrain.ping
    if not reference:
        return

    def send() -> None:
        retry.follow_certificates()
        address = looked_up(reference, "its address").rstrip("/")
        data = mask(text).encode()
        requests.post(f"{address}{signal}", data=data, timeout=5.0).raise_for_status()

    _sent("retrain.ping", f"the signal {signal or 'success'!r}", send)


def _sent(field: str, what: str, send: Callable[[], None]) -> bool:
    """Send up to three times; return True if that succeeded, else log one warning."""
    for pause in (1.0, 3.0, None):  # seconds before the next try
        try:
            send()
            return True
        except Exception as error:
            # A failed notification must not change the result of the retraining.
            if pause is None or isinstance(error, UserError):
                logger.warning(f"{field}: {what} was not sent: {_failure_reason(error)}")
                break
            time.sleep(pause)
    return False


def _post(url: str, body: str) -> None:
    retry.follow_certificates()
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
