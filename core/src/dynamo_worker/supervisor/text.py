"""What goes into a log, however it got here: no control characters, no lines of its own, no secrets."""

from __future__ import annotations

import json
import re
from typing import Final

#: What terminals and log viewers act on rather than show: control characters, line and paragraph separators, and what
#: reorders a line. As in JSON, so that one replacement does for both formats.
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

#: What may hold an address: nothing in it that stands between two of them.
_WORD = re.compile(r"[^\s,]+")
_SEPARATOR = re.compile(r"[\s,]")

# Texts may be anybody's and of any length, and the event loop waits: no pattern may look at the same part of a text
# again and again. So what repeats is bounded, or ends where the next attempt begins.

#: Before a user, with or without a password.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,30}://(?=[^/])")
#: A user with a password where there is no scheme.
_USER = re.compile(r"(?:^|[;\"'(=\[])(?P<user>[^/:;\"'(=\[]+:)(?!//)")
_SECRET_NAME = re.compile(
    r"(?:^|.*[_-])(?:api[_-]?key|key|keys|token|password|passwd|passphrase|secret|credentials?)", re.IGNORECASE
)
#: A member of a JSON object whose name says that it is a secret; its value may be cut off.
_SECRET_MEMBER = re.compile(
    r"(?P<name>[\"'](?:[^\"']*[_-])?(?:api[_-]?key|key|token|password|passwd|passphrase|secret)[\"']\s*:\s*)"
    r"(?:\"[^\"\\]*(?:\\.[^\"\\]*)*(?:\"|\\?\Z)|'[^'\\]*(?:\\.[^'\\]*)*(?:'|\\?\Z))",
    re.IGNORECASE | re.DOTALL,
)


def redacted(text: str, most: int | None = None) -> str:
    """Return a text without passwords: those of addresses, and those in what looks like JSON.

    :param most: so many characters of the text at most; the rest is not looked at.
    """
    if most is not None and len(text) > most:
        # A password that is cut off is one, too, although its "@" is missing.
        at = text.find("@", most)
        goes_on = at >= 0 and not _SEPARATOR.search(text, most, at)
        return redacted(f"{text[:most]}@" if goes_on else text[:most]).removesuffix("@")[:most] + "…"
    if ":" in text:
        text = _SECRET_MEMBER.sub(rf'\g<name>"{_REDACTED}"', text)
    return _WORD.sub(lambda word: _without_user(word[0]), text) if "@" in text else text


def _without_user(word: str) -> str:
    # A password may have any character in it: up to the last "@" all may belong to it.
    before, at, host = word.rpartition("@")
    if not at:
        return word
    if scheme := _SCHEME.search(before):
        return f"{_without_user(before[: scheme.start()])}{scheme[0]}{_REDACTED}@{host}"
    if user := _USER.search(before):
        return f"{before[: user.start('user')]}{_REDACTED}@{host}"
    return word


def without_secrets(name: str, value: object, most: int | None = None) -> object:
    """Return the value of a setting or a field as it may be shown; what JSON does not know becomes text.

    :param name: what it is called: tokens, keys and passwords are not shown at all.
    :param most: so many characters of a text at most.
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
    """Return a text without what terminals act on; its lines stay."""
    return text.translate(_ESCAPES)


def safe(text: str, most: int | None = None) -> str:
    """Return a text, or ``most`` characters of it, for a log or a terminal; its lines stay."""
    return escaped(redacted(text, most))


def continued(text: str, most: int | None = None) -> str:
    """Return a text whose second and further lines are indented: none of them passes for an event of its own."""
    return escaped(redacted(text, most).replace("\r\n", "\n")).replace("\n", "\n" + _INDENT)


def indented(text: str, most: int | None = None) -> str:
    """Return a text with all of its lines indented."""
    return _INDENT + continued(text, most)


def format_value(value: object, name: str = "", most: int | None = None) -> str:
    """Return a field's value as text, quoted where it would not read as one word.

    :param name: the field's: tokens, keys and passwords are not shown at all.
    :param most: so many characters of the value at most.
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
