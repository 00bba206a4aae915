"""Secrets: recognised, masked in logs and messages, and looked up where a config names their place.

A config is copied into every checkpoint and into MLflow, so it must not hold a password. It names a place
instead: `env:NAME`, a variable, or `file:/PATH`, a file with one line. The place is looked up where it is used,
and what it holds is never written.
"""

import os
import re
from pathlib import Path
from urllib.parse import unquote

from olora_ray.common.errors import UserError

_HIDDEN = "***"
# scheme://user:password@ up to the last @, because passwords with an @ are met; but not http://host:5000/x@y.
_PASSWORD = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s/@:'\"]*:)(?!\d{1,5}/)[^\s'\"]+@")
# https://token@host. Other schemes have names there that are no secret, such as gs://anonymous@bucket.
_TOKEN = re.compile(r"(https?://)[^\s/@:'\"]+@")
_SECRET_NAME = "".join(  # pwd, token, ... as a whole part of a name only: max_new_tokens is none
    (
        r"[\w.-]*(?:password|passwd|secret|(?<![A-Za-z])(?:pwd|token|sig|signature|credentials?",
        r"|(?:api|access|account|private)[_-]?key)(?![A-Za-z]))[\w.-]*",
    )
)
_VALUE = re.compile(rf"({_SECRET_NAME}=)[^\s&;#'\"]+", re.IGNORECASE)


def mask(text: str) -> str:
    """The text with *** for passwords and tokens in URIs, and for values of names such as secret_key=."""
    return _VALUE.sub(rf"\1{_HIDDEN}", _TOKEN.sub(rf"\1{_HIDDEN}@", _PASSWORD.sub(rf"\1{_HIDDEN}@", text)))


def in_uri(text: str) -> bool:
    """Whether the text is a URI with a password, token or key in it."""
    return "://" in text and any(mask(form) != form for form in (text, unquote(text)))


def is_name(name: str) -> bool:
    """Whether something of this name is a secret: password, api_key, hub_token."""
    return re.fullmatch(_SECRET_NAME, name, re.IGNORECASE) is not None


def looked_up(value: str, field: str) -> str:
    """The value that `env:NAME` or `file:/PATH` holds; any other value is returned as it is.

    Raises UserError that starts with `field` if the variable or the file is not there or empty.
    """
    kind, _, place = value.partition(":")
    if kind == "env":
        if not (held := os.environ.get(place, "").strip()):
            raise UserError(f"{field}: {value}: the variable {place} is not set where this runs")
        return held
    if kind == "file" and not place.startswith("//"):
        return _line_of(Path(place).expanduser(), f"{field}: {value}")
    return value


def _line_of(path: Path, where: str) -> str:
    if not path.is_absolute():
        raise UserError(f"{where}: give the file by its absolute path, file:/PATH")
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    if len(lines) != 1:
        raise UserError(f"{where}: expected one line with an address, found {len(lines)} words")
    return lines[0]
