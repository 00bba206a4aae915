"""Secrets: recognise them, mask them in log lines and messages, and read those to which a config refers.

A config is copied into every checkpoint and into MLflow, so it must not contain a password. Instead it refers to one:
`env:NAME` is an environment variable, `file:/PATH` a file with one line. The reference is resolved where the value is
used, and the value is never written.

`mask` processes every line that is shown, and a line may have any text: a model's answer, a server's error page. So
each pattern must take time linear in the text. A name is tried only at its first letter, and quantifiers are possessive
(`++`), or backtrack at most once.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from olora_ray.common.errors import UserError

_HIDDEN = "***"
_WORD_WITH_AT = re.compile(r"(?<![^\s'\"])[^\s'\"@]*+@[^\s'\"]*+")
# `user:` in scheme://user:password@. The password ends at the last @, because some have an @ in them. The host and port
# in http://host:5000/x@y must not match.
_USER = re.compile(r"[A-Za-z0-9+.-]://[^\s/@:'\"]*:(?!\d{1,5}/)")
# https://token@host. With other schemes the name there is no secret: gs://anonymous@bucket.
_TOKEN = re.compile(r"(https?://)[^\s/@:'\"]+@")

# pwd, token, ... must be a complete part of the name: max_new_tokens is no secret. Nor is a tokenizer's eos_token.
_NAME = re.compile(
    r"password|passwd|secret(?!ar)|(?:(?<![a-z])|(?-i:(?<=[a-z])(?=[A-Z])))"
    r"(?:pwd|(?<![bec]os_)(?<!pad_)(?<!unk_)(?<!cls_)(?<!sep_)(?<!mask_)token|sig|signature|credentials?|authorization"
    r"|(?:api|access|account|private)[_-]?key)(?![a-z])",
    re.IGNORECASE,
)
_LONGEST_NAME = 256
_IN_NAMES = (
    "password",
    "passwd",
    "secret",
    "pwd",
    "token",
    "sig",
    "credential",
    "authorization",
    "key",
)
"""Parts of which every name of a secret has one: a fast test before the regular expressions."""
_FIELD = re.compile(r"(?<![\w.-])([\w.-]++)(\\?['\"]?[ \t]*+[:=][ \t]*+)")
_QUOTED = re.compile(
    r"(['\"])((?:(?!\1)[^\\\n]|\\[^\n])++)|(\\['\"])((?:[^'\"\\\n]|\\(?!['\"])[^\n])++)"
)
_BARE = re.compile(r"[^\s&;#'\"]++")
# Two words after a colon are a sentence, not a value: `token: expected one line`. And null is no password.
_AFTER_COLON = re.compile(
    r"(?!(?:null|none|true|false)\b|[A-Za-z'-]++[.,;:!?]?[ \t]++\S)[^\s'\"]*[^\s'\",;)}\]]",
    re.IGNORECASE,
)
_SCHEME = re.compile(
    r"\b(Bearer|Basic|Token|Digest|Negotiate|ApiKey)([ \t]++)([\w.~+/=-]++)", re.IGNORECASE
)
_AUTHORIZATION = re.compile(r"authorization\\?['\"]?[ \t]*+[:=][ \t]*+\\?['\"]?$", re.IGNORECASE)
# `--password x` on a command line, also in Python's list of its words: '--password', 'x'. A value that begins with a
# dash would be the next option.
_OPTION = re.compile(
    r"(?<![\w.-])(--[\w-]++)((?:['\"],)?[ \t]++)(?:(')[^'\n]++|(\")[^\"\n]++|[^\s'\"-][^\s'\"]*+)"
)
# curl -u user:password, -su user:password, -uuser:password, --user user:password. Only in a line with `curl`, because
# docker's `--user 1000:1000` is no secret.
_CURL_USER = re.compile(
    r"(?<![\w.-])((?:-[A-Za-z]{0,5}u(?:['\"],)?[ \t]++|-u|--(?:proxy-)?user(?:=|(?:['\"],)?[ \t]++))"
    r"(?P<quote>['\"])?[^\s:'\"]++:)(?(quote)[^'\"\n]++|[^\s'\"]++)"
)
# The complete Cookie: or Set-Cookie: header. Its values may have quotes.
_COOKIE = re.compile(
    r"\b((?:set-)?cookie\\?['\"]?[ \t]*+:[ \t]*+\\?['\"]?)[\w.%$-]++=(?:(?<==)['\"][^'\"\n]*+['\"]?|[^'\"\\\n])*+",
    re.IGNORECASE,
)
# Tokens with a known form: Hugging Face, AWS, Google, GitHub, GitLab, Databricks, Slack, OpenAI, JSON web tokens.
_FORMS = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{30,}+|A[KS]IA[A-Z0-9]{16}|AIza[\w-]{30,}+|gh[opsur]_[A-Za-z0-9]{30,}+"
    r"|github_pat_\w{30,}+|glpat-[\w-]{20,}+|dapi[0-9a-f]{32}|xox[abeprs]-[\w-]{20,}+|sk-[\w-]{32,}+"
    r"|eyJ[\w-]{10,}+\.[\w-]{10,}+\.[\w-]*+)(?![A-Za-z0-9])"
)
_IN_FORMS = ("hf_", "AKIA", "ASIA", "AIza", "gh", "glpat-", "dapi", "xox", "sk-", "eyJ")


def mask(text: str) -> str:
    """Return the text with *** instead of secrets.

    Secrets are passwords and tokens in URIs, values after `secret_key=` and similar names, values of options such as
    --password, the password of `curl -u`, the headers `Authorization:`, `Cookie:` and `Set-Cookie:`, and tokens with a
    known form such as hf_...
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
        if "--" in text:
            text = _OPTION.sub(_without_value, text)
    return text


def in_uri(text: str) -> bool:
    """True if the text is a URI that contains a password, token or key."""
    return "://" in text and any(mask(form) != form for form in (text, unquote(text)))


def is_name(name: str) -> bool:
    """True if a field with this name is a secret: password, api_key, hub_token."""
    return (
        re.fullmatch(r"[\w.-]+", name) is not None
        and _NAME.search(name[-_LONGEST_NAME:]) is not None
    )


def _without_password(match: re.Match[str]) -> str:
    word = match[0]
    last = word.rindex("@")
    for user in _USER.finditer(word, 0, last):
        if user.end() < last:
            return f"{word[: user.end()]}{_HIDDEN}{word[last:]}"
    return word


def _without_credentials(match: re.Match[str]) -> str:
    scheme, blank, value = match.groups()
    before = match.string[max(0, match.start() - 40) : match.start()]
    # `bearer` is also a usual word: without `Authorization:` before it, only a long value with digits is a token.
    bare = scheme.lower() == "bearer" and len(value) >= 16 and any(sign.isdigit() for sign in value)
    if bare or _AUTHORIZATION.search(before):
        return f"{scheme}{blank}{_HIDDEN}"
    return match[0]


def _without_value(match: re.Match[str]) -> str:
    option, blank, *quotes = match.groups()
    if not is_name(option):
        return match[0]
    return f"{option}{blank}{''.join(filter(None, quotes))}{_HIDDEN}"


def _fields_masked(text: str) -> Iterator[str]:
    end = 0
    for field in _FIELD.finditer(text):
        if field.start() < end or not is_name(field[1]):
            continue
        sign = field[2]
        group = 0
        value = _QUOTED.match(text, field.end())
        if value:
            group = 2 if value[1] else 4
        elif sign == "=":
            value = _BARE.match(text, field.end())
        elif (
            sign[0] in "'\"\\" or sign[-1] in " \t"
        ):  # otherwise a file and a line: test_token.py:12
            value = _AFTER_COLON.match(text, field.end())
        if value:
            yield text[end : value.start(group)] + _HIDDEN
            end = value.end(group)
    yield text[end:]


def looked_up(value: str, field: str) -> str:
    """Return the content of `env:NAME` or `file:/PATH`; any other value is returned unchanged.

    Raises a UserError that starts with `field` if the environment variable or the file is missing or empty.
    """
    scheme, _, name = value.partition(":")
    if scheme == "env":
        content = os.environ.get(name, "").strip()
        if not content:
            raise UserError(
                f"{field}: {value}: the environment variable {name} is not set in this process"
            )
        return content
    if scheme != "file" or name.startswith("//"):
        return value
    path = Path(name).expanduser()
    if not path.is_absolute():
        raise UserError(f"{field}: {value}: use the absolute path of the file, file:/PATH")
    try:
        words = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"{field}: {value}: cannot be read: {problem}") from None
    if len(words) != 1:
        raise UserError(
            f"{field}: {value}: expected one line with an address, found {len(words)} words"
        )
    return words[0]
