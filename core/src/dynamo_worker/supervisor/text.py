"""Makes any text safe for a log: no control characters, no forged lines, no secrets."""

from __future__ import annotations

import json
import re
from typing import Final

#: Characters that terminals and log viewers act on: control characters, line and paragraph separators, bidirectional
#: controls. Escaped as in JSON, so one replacement serves both formats.
_ESCAPES: Final = {
    code: f"\\u{code:04x}"
    for code in (
        *range(0x20),
        *range(0x7F, 0xA0),
        0x61C,
        0x200E,
        0x200F,
        *range(0x2028, 0x202F),
        *range(0x2066, 0x206A),
    )
    if chr(code) not in "\n\t"
}

_INDENT: Final = "    "
_REDACTED: Final = "***"

#: A word that may contain an address: no separator of addresses in it.
_WORD = re.compile(r"[^\s,]+")
_SEPARATOR = re.compile(r"[\s,]")

# Texts come from anybody, of any length, and the event loop waits: no pattern may go over the same part again and
# again. So repetitions are bounded, or end where the next attempt begins.

#: Before a user, with or without a password.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,30}://(?=[^/])")
#: A user with a password where there is no scheme.
_USER = re.compile(r"(?:^|[;\"'(=\[])(?P<user>[^/:;\"'(=\[]+:)(?!//)")
_SECRET_NAME = re.compile(
    r"(?:^|.*[_-])(?:api[_-]?key|key|keys|token|password|passwd|passphrase|secret|credentials?)", re.IGNORECASE
)
#: A member of a JSON object whose name marks it as a secret; its value may be cut off.
_SECRET_MEMBER = re.compile(
    r"(?P<name>[\"'](?:[^\"']*[_-])?(?:api[_-]?key|key|token|password|passwd|passphrase|secret)[\"']\s*:\s*)"
    r"(?:\"[^\"\\]*(?:\\.[^\"\\]*)*(?:\"|\\?\Z)|'[^'\\]*(?:\\.[^'\\]*)*(?:'|\\?\Z))",
    re.IGNORECASE | re.DOTALL,
)


def redacted(text: str, most: int | None = None) -> str:
    """Return a text without the passwords in its addresses and in what looks like JSON.

    :param most: characters of the text to return at most; the rest is not examined.
    """
    if most is not None and len(text) > most:
        # A password that is cut off is still one, although its "@" is missing.
        at = text.find("@", most)
        goes_on = at >= 0 and not _SEPARATOR.search(text, most, at)
        return redacted(f"{text[:most]}@" if goes_on else text[:most]).removesuffix("@")[:most] + "…"
    if ":" in text:
        text = _SECRET_MEMBER.sub(rf'\g<name>"{_REDACTED}"', text)
    return _WORD.sub(lambda word: _without_user(word[0]), text) if "@" in text else text


def _without_user(word: str) -> str:
    # A password may contain any character: everything up to the last "@" may belong to it.
    before, at, host = word.rpartition("@")
    if not at:
        return word
    if scheme := _SCHEME.search(before):
        return f"{_without_user(before[: scheme.start()])}{scheme[0]}{_REDACTED}@{host}"
    if user := _USER.search(before):
        return f"{before[: user.start('user')]}{_REDACTED}@{host}"
    return word


def without_secrets(name: str, value: object, most: int | None = None) -> object:
    """Return the value of a setting or field as it may be shown; what JSON does not know becomes text.

    :param name: its name: tokens, keys and passwords are hidden.
    :param most: characters of a text to return at most.
    """
    if isinstance(value, dict):
        return {key: without_secrets(str(key), inner, most) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(name, inner, most) for inner in value]
    if value is None or isinstance(value, (int, float)):
        return value
    text = str(value)
    return _REDACTED if text and _SECRET_NAME.fullmatch(name) else redacted(text, most)


def escaped(text: str) -> str:
    """Return a text without what terminals act on; line breaks stay."""
    return text.translate(_ESCAPES)


def safe(text: str, most: int | None = None) -> str:
    """Return a text, or ``most`` characters of it, for a log or a terminal; line breaks stay."""
    return escaped(redacted(text, most))


def continued(text: str, most: int | None = None) -> str:
    """Return a text with all lines but the first indented, so none passes for a log line."""
    return escaped(redacted(text, most).replace("\r\n", "\n")).replace("\n", "\n" + _INDENT)


def indented(text: str, most: int | None = None) -> str:
    """Return a text with all lines indented."""
    return _INDENT + continued(text, most)


def format_value(value: object, name: str = "", most: int | None = None) -> str:
    """Return a field's value as text, quoted where it would not read as one word.

    :param name: the field's name: tokens, keys and passwords are hidden.
    :param most: characters of the value to return at most.
    """
    value = without_secrets(name, value, most)
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.3f}".rstrip("0").rstrip(".")
    text = value if isinstance(value, str) else redacted(str(value), most)
    if text and text.isprintable() and not any(character in text for character in ' "='):
        return text
    return escaped(json.dumps(text, ensure_ascii=False))
