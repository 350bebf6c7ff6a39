"""The shape of one option: its names, its default, and the check of a single value.

Standard library only: `--help` and the documentation are built without importing pydantic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

from dynamo_worker.suggest import suggestion

ENGINE: Final = "Engine"
DISCOVERY: Final = "Discovery and request plane"
SHUTDOWN: Final = "Shutdown"
HEALTH: Final = "Health"
CONTROL: Final = "Control routes"
FRONTEND: Final = "Frontend"
MODEL: Final = "Model registration"
RUNTIME: Final = "Variables of the Dynamo runtime"
PLUGINS: Final = "Plugins"
LOGGING: Final = "Logging"

#: The headings in the order in which ``--help`` shows them.
GROUPS: Final = (ENGINE, DISCOVERY, SHUTDOWN, HEALTH, CONTROL, FRONTEND, MODEL, RUNTIME, PLUGINS, LOGGING)


@dataclass(frozen=True)
class Number:
    """The numbers an option accepts.

    :param minimum: the smallest one.
    :param maximum: the largest one.
    :param unit: what is counted, ``seconds``; empty for an integer.
    :param never: whether 0, meaning "never", is accepted below ``minimum``.
    """

    minimum: float
    maximum: float
    unit: str = ""
    never: bool = False

    def parse(self, value: object) -> float:
        """Return the number that a flag, a variable or a YAML value stands for.

        :raises ValueError: the value is not one of the accepted numbers.
        """
        # YAML reads `yes` and `on` as true, which would pass for 1.
        if not isinstance(value, (str, int, float)) or isinstance(value, bool):
            raise ValueError(f"expected {self}, got {_type_name(value)}")
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = float("nan")
        accepted = self.minimum <= number <= self.maximum or (self.never and number == 0)
        if not accepted or not (self.unit or number.is_integer()):
            raise ValueError(f"expected {self}")
        return number if self.unit else int(number)

    def __str__(self) -> str:
        kind = f"a number of {self.unit}" if self.unit else "an integer"
        text = f"{kind} between {plain(self.minimum)} and {plain(self.maximum)}"
        return f"{text}, or 0 for never" if self.never else text


@dataclass(frozen=True)
class Option:
    """One option and all its names.

    :param name: name of the field of ``WorkerSettings``, and the YAML key.
    :param group: heading under which ``--help`` and the documentation show it.
    :param help: what it does, in one sentence; shown everywhere.
    :param env: its environment variable; empty if it has none.
    :param default: its value when none is given.
    :param default_text: the default in words, where the value alone is unclear.
    :param metavar: placeholder for the value.
    :param choices: the accepted words; case is ignored.
    :param number: the accepted numbers.
    :param kind: a ``value``, a ``list`` (repeatable flag) or a ``switch``.
    :param long: its flag, if that is not the name with dashes.
    :param alias: another flag for the same option. An engine may claim either one; see
        :class:`~dynamo_worker.kit.engine_plugin.EnginePlugin`.
    :param short: its one-letter flag.
    :param bare: the value of the flag when it stands alone; None if it needs a value.
    """

    name: str
    group: str
    help: str
    env: str = ""
    default: Any = None
    default_text: str | None = None
    metavar: str = ""
    choices: tuple[str, ...] = ()
    number: Number | None = None
    kind: Literal["value", "list", "switch"] = "value"
    long: str = ""
    alias: str = ""
    short: str | None = None
    bare: str | None = None

    @property
    def flag(self) -> str:
        """Return the flag, ``--termination-grace-period``."""
        return self.long or flag_name(self.name)

    @property
    def flags(self) -> tuple[str, ...]:
        """Return all spellings of the flag, including the one that turns a switch off."""
        if self.kind == "switch":
            return (self.flag, f"--no-{self.flag[2:]}")
        names = (f"-{self.short}" if self.short else "", self.flag, self.alias)
        return tuple(name for name in names if name)

    @property
    def placeholder(self) -> str:
        """Return what stands for the value in ``--help``; empty for a switch."""
        return "{" + ",".join(self.choices) + "}" if self.choices else self.metavar

    @property
    def shown_default(self) -> str:
        """Return the default in words."""
        if self.default_text is not None:
            return self.default_text
        return "none" if self.default is None else str(plain(self.default))

    @property
    def summary(self) -> str:
        """Return the help text with the default and the environment variable."""
        text = f"{self.help} [default: {self.shown_default}]"
        return f"{text} [env:\N{NO-BREAK SPACE}{self.env}]" if self.env else text

    def parse(self, value: object) -> object:
        """Check a value against ``choices`` and ``number``; return other values unchanged.

        :raises ValueError: the value is not accepted; the message starts with "expected".
        """
        if self.number is not None:
            return self.number.parse(value)
        if self.choices and value is not None:
            word = value.lower() if isinstance(value, str) else value
            if word not in self.choices:
                raise ValueError(f"expected one of {', '.join(self.choices)}{suggestion(str(word), self.choices)}")
            return word
        return value


def flag_name(field_name: str) -> str:
    """Return the flag of a field."""
    return "--" + field_name.replace("_", "-")


def plain(value: object) -> object:
    """Return a value as a person would write it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _type_name(value: object) -> str:
    names = {bool: "a boolean", list: "a list", tuple: "a list", dict: "a mapping", type(None): "nothing"}
    return names.get(type(value), f"a {type(value).__name__}")
