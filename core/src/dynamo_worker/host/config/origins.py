"""Where the value of a setting came from, and how messages name it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from dynamo_worker.host.config.option_types import flag_name


@dataclass(frozen=True)
class Origin:
    """The source of a value, and the name it has there.

    :param kind: ``flag``, ``environment``, ``file`` or ``default``.
    :param name: the flag, the variable or the file; empty for a default.
    :param note: what else made the value what it is.
    """

    kind: Literal["flag", "environment", "file", "default"]
    name: str = ""
    note: str = ""

    def __str__(self) -> str:
        return " ".join(word for word in (self.kind, self.name, self.note) if word)

    def describe(self, field_name: str, value: object) -> str:
        """Return the value as its user wrote it, such as ``--drain abort`` or ``DYN_WORKER_DRAIN=abort``."""
        shown = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        if self.kind == "flag":
            return f"{self.name} {shown}"
        if self.kind == "environment":
            return f"{self.name}={shown}"
        if self.kind == "file":
            return f"`{field_name}: {shown}` in {self.name}"
        return f"{flag_name(field_name)} {shown} (the default)"


DEFAULT: Final = Origin("default")
