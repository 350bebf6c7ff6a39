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

#: The user of an address, with or without a password; without a scheme only with one.
_USER = re.compile(r"(?P<before>\b[A-Za-z][A-Za-z0-9+.-]*://|(?<![^\s,;\"'(=\[])(?=[^\s/@:,;\"'(=\[]+:))[^\s/@,;\"']+@")
_SECRET_NAME = re.compile(
    r"(?:^|.*[_-])(?:api[_-]?key|key|keys|token|password|passwd|passphrase|secret|credentials?)", re.IGNORECASE
)
#: A member of a JSON object whose name says that it is a secret.
_SECRET_MEMBER = re.compile(
    r"(?P<name>[\"'](?:[^\"']*[_-])?(?:api[_-]?key|key|token|password|passwd|passphrase|secret)[\"']\s*:\s*)"
    r"(?:\"[^\"]*\"|'[^']*')",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """Return a text without passwords: those of addresses, and those in what looks like JSON."""
    if "@" in text:
        text = _USER.sub(rf"\g<before>{_REDACTED}@", text)
    return _SECRET_MEMBER.sub(rf'\g<name>"{_REDACTED}"', text) if ":" in text else text


def without_secrets(name: str, value: object) -> object:
    """Return the value of a setting as it may be shown.

    :param name: what it is called: tokens, keys and passwords are not shown at all.
    """
    if isinstance(value, dict):
        return {key: without_secrets(str(key), inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(name, inner) for inner in value]
    if not isinstance(value, str) or not value:
        return value
    return _REDACTED if _SECRET_NAME.fullmatch(name) else redacted(value)


def safe(text: str) -> str:
    """Return a text for a log or a terminal; its lines stay."""
    return redacted(text).translate(_ESCAPES)


def continued(text: str) -> str:
    """Return a text whose second and further lines are indented: none of them passes for an event of its own."""
    return safe(text.replace("\r\n", "\n")).replace("\n", "\n" + _INDENT)


def indented(text: str) -> str:
    """Return a text with all of its lines indented."""
    return _INDENT + continued(text)


def format_value(value: object) -> str:
    """Return a field's value as text, quoted where it would not read as one word."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.3f}".rstrip("0").rstrip(".")
    text = redacted(str(value))
    if text and text.isprintable() and not any(character in text for character in ' "='):
        return text
    return json.dumps(text, ensure_ascii=False).translate(_ESCAPES)
