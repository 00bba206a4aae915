"""Secrets: recognised, masked in logs and messages, and looked up where a config names their place.

A config is copied into every checkpoint and into MLflow, so it must not hold a password. It names a place
instead: `env:NAME`, a variable, or `file:/PATH`, a file with one line. The place is looked up where it is used,
and what it holds is never written.

`mask` goes over every line that is shown, and a line may hold anything: a model's answer, a server's page. So each
pattern here takes time linear in the text: a name is tried at its first letter only, and what a quantifier took
it does not give back (`++`), or only once.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from olora_ray.common.errors import UserError

_HIDDEN = "***"
_WORD_WITH_AT = re.compile(r"(?<![^\s'\"])[^\s'\"@]*+@[^\s'\"]*+")
# user: of scheme://user:password@, up to the last @, because passwords with an @ are met; but not http://host:5000/x@y.
_USER = re.compile(r"[A-Za-z0-9+.-]://[^\s/@:'\"]*:(?!\d{1,5}/)")
# https://token@host. Other schemes have names there that are no secret, such as gs://anonymous@bucket.
_TOKEN = re.compile(r"(https?://)[^\s/@:'\"]+@")

# pwd, token, ... as a whole part of a name only: max_new_tokens is no secret; nor is the eos_token of a tokenizer.
_NAME = re.compile(
    r"password|passwd|secret(?!ar)|(?:(?<![a-z])|(?-i:(?<=[a-z])(?=[A-Z])))"
    r"(?:pwd|(?<![bec]os_)(?<!pad_)(?<!unk_)(?<!cls_)(?<!sep_)(?<!mask_)token|sig|signature|credentials?|authorization"
    r"|(?:api|access|account|private)[_-]?key)(?![a-z])",
    re.IGNORECASE,
)
_LONGEST_NAME = 256
_IN_NAMES = ("password", "passwd", "secret", "pwd", "token", "sig", "credential", "authorization", "key")
"""Every name of a secret has one of these in it, in lower case."""
_FIELD = re.compile(r"(?<![\w.-])([\w.-]++)(\\?['\"]?[ \t]*+[:=][ \t]*+)")
_QUOTED = re.compile(r"(['\"])((?:(?!\1)[^\\\n]|\\[^\n])++)|(\\['\"])((?:[^'\"\\\n]|\\(?!['\"])[^\n])++)")
_BARE = re.compile(r"[^\s&;#'\"]++")
# A word with another one behind it is a sentence, `token: expected one line`, and null is no password.
_AFTER_COLON = re.compile(
    r"(?!(?:null|none|true|false)\b|[A-Za-z'-]++[.,;:!?]?[ \t]++\S)[^\s'\"]*[^\s'\",;)}\]]", re.IGNORECASE
)
_SCHEME = re.compile(r"\b(Bearer|Basic|Token|Digest|Negotiate|ApiKey)([ \t]++)([\w.~+/=-]++)", re.IGNORECASE)
_AUTHORIZATION = re.compile(r"authorization\\?['\"]?[ \t]*+[:=][ \t]*+\\?['\"]?$", re.IGNORECASE)
# --password x on a command line, also as Python shows its list of words: '--password', 'x'. The value may not begin
# with a dash: then it is the next option.
_OPTION = re.compile(r"(?<![\w.-])(--[\w-]++)((?:['\"],)?[ \t]++)(?:(')[^'\n]++|(\")[^\"\n]++|[^\s'\"-][^\s'\"]*+)")
# curl -u user:password, -su user:password, -uuser:password, --user user:password; only in a line about curl, since
# --user 1000:1000 of docker is no secret.
_CURL_USER = re.compile(
    r"(?<![\w.-])((?:-[A-Za-z]{0,5}u(?:['\"],)?[ \t]++|-u|--(?:proxy-)?user(?:=|(?:['\"],)?[ \t]++))"
    r"(?P<quote>['\"])?[^\s:'\"]++:)(?(quote)[^'\"\n]++|[^\s'\"]++)"
)
# All of a Cookie: or Set-Cookie: header, whose values may be quoted themselves.
_COOKIE = re.compile(
    r"\b((?:set-)?cookie\\?['\"]?[ \t]*+:[ \t]*+\\?['\"]?)[\w.%$-]++=(?:(?<==)['\"][^'\"\n]*+['\"]?|[^'\"\\\n])*+",
    re.IGNORECASE,
)
# Tokens that are known by their form: Hugging Face, AWS, Google, GitHub, GitLab, Databricks, Slack, OpenAI, JSON web
# tokens.
_FORMS = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{30,}+|A[KS]IA[A-Z0-9]{16}|AIza[\w-]{30,}+|gh[opsur]_[A-Za-z0-9]{30,}+"
    r"|github_pat_\w{30,}+|glpat-[\w-]{20,}+|dapi[0-9a-f]{32}|xox[abeprs]-[\w-]{20,}+|sk-[\w-]{32,}+"
    r"|eyJ[\w-]{10,}+\.[\w-]{10,}+\.[\w-]*+)(?![A-Za-z0-9])"
)
_IN_FORMS = ("hf_", "AKIA", "ASIA", "AIza", "gh", "glpat-", "dapi", "xox", "sk-", "eyJ")


def mask(text: str) -> str:
    """The text with *** for secrets.

    These are passwords and tokens in URIs; values of names such as secret_key, `=` or `:` before them; values of
    options such as --password; the password of `curl -u`; what follows `Authorization:`, `Cookie:` and `Set-Cookie:`;
    tokens that are known by their form, such as hf_...
    """
    if "://" in text and "@" in text:
        text = _TOKEN.sub(rf"\1{_HIDDEN}@", _WORD_WITH_AT.sub(_without_password, text))
    if any(begin in text for begin in _IN_FORMS):
        text = _FORMS.sub(_HIDDEN, text)
    lower = text.lower()
    if "bearer" in lower or "authorization" in lower:
        text = _SCHEME.sub(_without_credentials, text)
    if "cookie" in lower:
        text = _COOKIE.sub(rf"\1{_HIDDEN}", text)
    if "curl" in lower:
        text = _CURL_USER.sub(rf"\1{_HIDDEN}", text)
    if any(part in lower for part in _IN_NAMES):
        text = "".join(_fields_masked(text))
        text = _OPTION.sub(_without_value, text) if "--" in text else text
    return text


def in_uri(text: str) -> bool:
    """True if the text is a URI with a password, token or key in it."""
    return "://" in text and any(mask(form) != form for form in (text, unquote(text)))


def is_name(name: str) -> bool:
    """True if something of this name is a secret: password, api_key, hub_token."""
    return re.fullmatch(r"[\w.-]+", name) is not None and _NAME.search(name[-_LONGEST_NAME:]) is not None


def _without_password(found: re.Match[str]) -> str:
    word = found[0]
    last = word.rindex("@")
    for user in _USER.finditer(word, 0, last):
        if user.end() < last:
            return f"{word[: user.end()]}{_HIDDEN}{word[last:]}"
    return word


def _without_credentials(found: re.Match[str]) -> str:
    scheme, blank, value = found.groups()
    before = found.string[max(0, found.start() - 40) : found.start()]
    bare = scheme.lower() == "bearer" and len(value) >= 16 and any(sign.isdigit() for sign in value)
    return f"{scheme}{blank}{_HIDDEN}" if bare or _AUTHORIZATION.search(before) else found[0]


def _without_value(found: re.Match[str]) -> str:
    option, blank, *quotes = found.groups()
    return f"{option}{blank}{''.join(filter(None, quotes))}{_HIDDEN}" if is_name(option) else found[0]


def _fields_masked(text: str) -> Iterator[str]:
    """The text in parts, with *** for what stands behind a secret's name."""
    done = 0
    for field in _FIELD.finditer(text):
        if field.start() < done or not is_name(field[1]):
            continue
        if place := _value(text, field[2], field.end()):
            yield text[done : place[0]] + _HIDDEN
            done = place[1]
    yield text[done:]


def _value(text: str, sign: str, begin: int) -> tuple[int, int] | None:
    """Begin and end of the value of a name, if there is one; `sign` is what stands between name and value."""
    if quoted := _QUOTED.match(text, begin):
        return quoted.span(2 if quoted[1] else 4)
    if sign == "=":
        found = _BARE.match(text, begin)
    elif sign[0] in "'\"\\" or sign[-1] in " \t":
        found = _AFTER_COLON.match(text, begin)
    else:  # tests/test_token.py:12: is a place
        found = None
    return found.span() if found else None


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
