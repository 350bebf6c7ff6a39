"""The worker's settings: one model, whose fields are the flags, the environment variables and the YAML keys."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic import BeforeValidator, Field, PlainSerializer, PrivateAttr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from dynamo_worker.errors import UsageError
from dynamo_worker.shutdown_plan import ShutdownPlan
from dynamo_worker.suggest import suggestion

#: Where ``--frontend`` without a value listens.
DEFAULT_FRONTEND: Final = "127.0.0.1:8000"

#: The OpenAI surfaces that a model can be registered for: the members of ``dynamo.llm.ModelType`` in lower case.
ENDPOINT_TYPES: Final = (
    "chat",
    "completions",
    "embedding",
    "classify",
    "pooling",
    "rerank",
    "images",
    "audios",
    "videos",
    "realtime",
    "tensorbased",
    "empty",
)

#: The key of the configuration file that holds the engine's own flags; it is no setting of the worker.
ENGINE_ARGS_KEY: Final = "engine_args"


class Address(NamedTuple):
    """Where a server listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Option:
    """What a field of the settings is called from outside, and what it means.

    :param group: heading under which ``--help`` and the documentation show it.
    :param help: what it does, in one sentence; the only description there is.
    :param env: its environment variable.
    :param metavar: placeholder for the value in ``--help``.
    :param default: the default in words, where the value alone does not say it.
    :param short: its one-letter flag.
    :param bare: the value of the flag when it stands alone; None if it needs a value.
    """

    group: str
    help: str
    env: str
    metavar: str = ""
    default: str | None = None
    short: str | None = None
    bare: str | None = None


ENGINE: Final = "Engine"
DISCOVERY: Final = "Discovery and request plane"
SHUTDOWN: Final = "Shutdown"
HEALTH: Final = "Health"
FRONTEND: Final = "Frontend"
MODEL: Final = "Model registration"
PLUGINS: Final = "Plugins"
LOGGING: Final = "Logging"

#: The headings in the order in which ``--help`` shows them.
GROUPS: Final = (ENGINE, DISCOVERY, SHUTDOWN, HEALTH, FRONTEND, MODEL, PLUGINS, LOGGING)


#: A host name, an IPv4 address, an IPv6 address in brackets, or nothing.
_HOST: Final = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])?")


def _split_list(value: object) -> object:
    """Accept ``a,b`` wherever a list is wanted."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, (list, tuple)):
        return tuple(part.strip() for item in value for part in str(item).split(",") if part.strip())
    return value


def _parse_address(value: object) -> object:
    """Accept ``HOST:PORT``, ``HOST``, ``PORT`` and the words for yes and no."""
    if value is None or value is False:
        return None
    if value is True:
        value = DEFAULT_FRONTEND
    if isinstance(value, Address) or not isinstance(value, (str, int)):
        return value
    text = str(value).strip()
    if text.lower() in ("true", "yes", "on", ""):
        text = DEFAULT_FRONTEND
    if text.lower() in ("false", "no", "off"):
        return None
    default_host, _, default_port = DEFAULT_FRONTEND.rpartition(":")
    if text.isdecimal():
        text = f"{default_host}:{text}"
    elif ":" not in text or text.endswith("]"):
        text = f"{text}:{default_port}"
    host, _, port = text.rpartition(":")
    if not _HOST.fullmatch(host) or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError("is not HOST:PORT (an IPv6 address needs brackets: [::1]:8000)")
    return Address(host.strip("[]") or default_host, int(port))


def _check_endpoint_types(value: object) -> object:
    types = _split_list(value)
    if isinstance(types, tuple):
        for name in types:
            if name not in ENDPOINT_TYPES:
                raise ValueError(f"{name!r} is none of {', '.join(ENDPOINT_TYPES)}{suggestion(name, ENDPOINT_TYPES)}")
    return types


Words = Annotated[tuple[str, ...], BeforeValidator(_split_list)]
Seconds = Annotated[float, Ge(0), Le(10**7)]
PositiveSeconds = Annotated[float, Gt(0), Le(10**7)]
#: One part of ``namespace.component.endpoint``.
PathPart = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class WorkerSettings(BaseSettings):
    """All settings of a worker. Made by :func:`load`; ``WorkerSettings(...)`` takes values only, for tests.

    Unlike other pydantic-settings models it reads nothing by itself: :func:`load` asks the sources one by one, so
    that it knows where every value came from.
    """

    model_config = SettingsConfigDict(frozen=True, extra="forbid", validate_default=False)

    # --- Engine
    engine: Annotated[
        str,
        Option(
            ENGINE,
            "The engine to run; `dynamo-worker engines` lists what is installed.",
            "DYN_WORKER_ENGINE",
            "NAME",
            default="none, required",
        ),
    ] = ""
    config: Annotated[
        Path | None,
        Option(
            ENGINE,
            "YAML file with settings; its keys are the flags with underscores, `engine_args:` holds the engine's own "
            "flags.",
            "DYN_WORKER_CONFIG",
            "FILE",
        ),
    ] = None
    warmup: Annotated[
        bool,
        Option(ENGINE, "Run one small request before the model is registered.", "DYN_WORKER_WARMUP"),
    ] = True
    warmup_timeout: Annotated[
        PositiveSeconds,
        Option(ENGINE, "Give up the start when the warm-up takes longer.", "DYN_WORKER_WARMUP_TIMEOUT", "SECONDS"),
    ] = 600.0

    # --- Discovery and request plane (`frontend` stands here because the discovery backend depends on it)
    namespace: Annotated[PathPart, Option(DISCOVERY, "Dynamo namespace of the worker.", "DYN_NAMESPACE", "NAME")] = (
        "dynamo"
    )
    component: Annotated[PathPart, Option(DISCOVERY, "Dynamo component of the worker.", "DYN_COMPONENT", "NAME")] = (
        "backend"
    )
    endpoint: Annotated[
        PathPart,
        Option(
            DISCOVERY,
            "Dynamo endpoint that serves the model; `dyn://namespace.component.endpoint` sets all three.",
            "DYN_ENDPOINT",
            "NAME",
        ),
    ] = "generate"
    frontend: Annotated[
        Address | None,
        BeforeValidator(_parse_address),
        PlainSerializer(lambda value: None if value is None else str(value)),
        Option(
            FRONTEND,
            f"Run an OpenAI HTTP frontend beside the worker; alone it listens on {DEFAULT_FRONTEND}.",
            "DYN_WORKER_FRONTEND",
            "[HOST:PORT]",
            default="no frontend",
            bare=DEFAULT_FRONTEND,
        ),
    ] = None
    discovery_backend: Annotated[
        Literal["file", "etcd", "kubernetes", "mem"],
        Option(
            DISCOVERY,
            "How workers and frontends find each other.",
            "DYN_DISCOVERY_BACKEND",
            default="file with --frontend, else etcd",
        ),
    ] = Field(default_factory=lambda data: "file" if data.get("frontend") else "etcd")
    discovery_path: Annotated[
        Path | None,
        Option(
            DISCOVERY,
            "Directory of the `file` discovery backend.",
            "DYN_FILE_KV",
            "DIR",
            default="a private directory with --frontend, else Dynamo's own",
        ),
    ] = None
    discovery_timeout: Annotated[
        PositiveSeconds,
        Option(
            DISCOVERY,
            "How long the start waits for an unreachable discovery or NATS server.",
            "DYN_WORKER_DISCOVERY_TIMEOUT",
            "SECONDS",
        ),
    ] = 30.0
    request_plane: Annotated[
        Literal["tcp", "nats"], Option(DISCOVERY, "How requests reach the worker.", "DYN_REQUEST_PLANE")
    ] = "tcp"
    event_plane: Annotated[
        Literal["nats", "zmq"] | None,
        Option(DISCOVERY, "How KV-cache events reach the routers.", "DYN_EVENT_PLANE", default="Dynamo's choice"),
    ] = None

    # --- Shutdown
    drain: Annotated[
        Literal["complete", "handoff", "abort"],
        Option(
            SHUTDOWN,
            "What a stop does with requests in flight: wait for them and hand off what is left at the end; hand all of "
            "them to other workers at once; end them.",
            "DYN_WORKER_DRAIN",
        ),
    ] = "complete"
    termination_grace_period: Annotated[
        PositiveSeconds,
        Option(
            SHUTDOWN,
            "Seconds from the first signal to the platform's SIGKILL: Kubernetes' terminationGracePeriodSeconds "
            "(`dynamo-worker plan` shows how it is used).",
            "DYN_WORKER_TERMINATION_GRACE_PERIOD",
            "SECONDS",
        ),
    ] = 30.0
    grace_period: Annotated[
        Seconds,
        Option(
            SHUTDOWN,
            "Seconds to go on serving after leaving discovery, for routers that have not noticed yet.",
            "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS",
            "SECONDS",
            default="5 with --drain complete, else 0",
        ),
    ] = Field(default_factory=lambda data: 5.0 if data.get("drain") == "complete" else 0.0)
    engine_shutdown_timeout: Annotated[
        PositiveSeconds,
        Option(SHUTDOWN, "Longest time for one plugin's cleanup hook.", "ENGINE_SHUTDOWN_TIMEOUT", "SECONDS"),
    ] = 30.0
    termination_message_path: Annotated[
        Path,
        Option(
            SHUTDOWN,
            "File that receives one line of cause at the end, if it exists.",
            "DYN_WORKER_TERMINATION_MESSAGE_PATH",
            "FILE",
        ),
    ] = Path("/dev/termination-log")

    # --- Health
    health_check_interval: Annotated[
        PositiveSeconds,
        Option(
            HEALTH, "Seconds between two health checks of the engine.", "DYN_ENGINE_HEALTH_CHECK_INTERVAL", "SECONDS"
        ),
    ] = 2.0
    health_check_timeout: Annotated[
        PositiveSeconds,
        Option(HEALTH, "Longest time for one health check.", "DYN_ENGINE_HEALTH_CHECK_TIMEOUT", "SECONDS"),
    ] = 30.0
    stall_timeout: Annotated[
        Seconds,
        Option(
            HEALTH,
            "End the worker when the engine hangs this long: no progress of any kind and no answer to a canary request "
            "(0: never).",
            "DYN_WORKER_STALL_TIMEOUT",
            "SECONDS",
        ),
    ] = 30.0
    heartbeat_timeout: Annotated[
        Seconds,
        Option(
            HEALTH,
            "Kill the worker when its event loop is stuck this long while it serves (0: never).",
            "DYN_WORKER_HEARTBEAT_TIMEOUT",
            "SECONDS",
        ),
    ] = 25.0
    system_host: Annotated[
        str, Option(HEALTH, "Address of the server for /health, /live and /metrics.", "DYN_SYSTEM_HOST", "HOST")
    ] = "0.0.0.0"  # noqa: S104 - Dynamo's default: probes come from outside of the container
    system_port: Annotated[
        int,
        Ge(-1),
        Le(65535),
        Option(HEALTH, "Port of that server (-1: no server, 0: any free port).", "DYN_SYSTEM_PORT", "PORT"),
    ] = -1

    # --- Frontend
    migration_limit: Annotated[
        int,
        Ge(0),
        Option(
            FRONTEND,
            "How often the embedded frontend moves one request to another worker.",
            "DYN_MIGRATION_LIMIT",
            "N",
        ),
    ] = 3
    router_mode: Annotated[
        Literal["round-robin", "random", "kv", "least-loaded"],
        Option(FRONTEND, "How the embedded frontend picks a worker.", "DYN_ROUTER_MODE"),
    ] = "round-robin"

    # --- Model registration
    tool_call_parser: Annotated[
        str | None,
        Option(MODEL, "Parser of the frontend for tool calls in the output.", "DYN_TOOL_CALL_PARSER", "NAME"),
    ] = None
    reasoning_parser: Annotated[
        str | None,
        Option(MODEL, "Parser of the frontend for reasoning in the output.", "DYN_REASONING_PARSER", "NAME"),
    ] = None
    custom_jinja_template: Annotated[
        Path | None,
        Option(
            MODEL,
            "Chat template to use instead of the model's own.",
            "DYN_CUSTOM_JINJA_TEMPLATE",
            "FILE",
            default="the model's",
        ),
    ] = None
    endpoint_types: Annotated[
        tuple[str, ...],
        BeforeValidator(_check_endpoint_types),
        Option(
            MODEL,
            "OpenAI surfaces to register the model for, separated by commas (chat, completions, embedding, …).",
            "DYN_ENDPOINT_TYPES",
            "LIST",
            default="what the engine offers",
        ),
    ] = ()

    # --- Plugins
    plugin: Annotated[
        Words,
        Option(
            PLUGINS,
            "Load a plugin from a module that needs no packaging; the current directory is searched first "
            "(repeatable).",
            "DYN_WORKER_PLUGIN",
            "MODULE",
            default="none",
            short="p",
        ),
    ] = ()
    no_plugin: Annotated[
        Words,
        Option(
            PLUGINS,
            "Leave out an installed plugin (repeatable).",
            "DYN_WORKER_NO_PLUGIN",
            "NAME",
            default="none",
        ),
    ] = ()

    # --- Logging
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value),
        Option(LOGGING, "Least severity that is logged.", "DYN_WORKER_LOG_LEVEL"),
    ] = "info"
    log_format: Annotated[
        Literal["text", "json"],
        Option(LOGGING, "Lines for people, or one JSON object a line.", "DYN_WORKER_LOG_FORMAT"),
    ] = "text"

    _origins: dict[str, Origin] = PrivateAttr(default_factory=dict)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - part of the signature
        init_settings: PydanticBaseSettingsSource,
        *_: PydanticBaseSettingsSource,
        **__: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take the values that :func:`load` has collected and nothing else."""
        return (init_settings,)

    def origin(self, name: str) -> Origin:
        """Return where the value of the field ``name`` came from."""
        return self._origins.get(name, DEFAULT)

    def contradictions(self) -> list[str]:
        """Return what in these settings cannot be meant together, one sentence each."""
        found = []

        def named(name: str, value: object = None) -> str:
            """Return a setting under the name by which the user gave it."""
            shown = getattr(self, name) if value is None else value
            return self.origin(name).describe(name, _plain(shown))

        plan = ShutdownPlan.from_settings(self)
        if not plan.fits:
            found.append(
                f"{named('termination_grace_period')} and {named('grace_period')} contradict each other: "
                f"{plan.warnings[0]}"
            )
        if self.discovery_backend == "mem":
            other = f" and {named('frontend')} contradict each other" if self.frontend else " leaves the worker alone"
            found.append(
                f"{named('discovery_backend')}{other}: `mem` ends at the borders of one process, so that no frontend "
                "can find the worker"
            )
        # DYN_FILE_KV may be set for a whole cluster; a flag or a line in the file is meant for this worker.
        if self.discovery_backend != "file" and self.origin("discovery_path").kind in ("flag", "file"):
            found.append(
                f"{named('discovery_path')} needs the `file` discovery backend, but it is "
                f"{self.discovery_backend} ({self.origin('discovery_backend')})"
            )
        if self.frontend is not None and self.frontend.port == self.system_port != 0:
            found.append(f"{named('frontend')} and {named('system_port')} contradict each other: both want one port")
        if self.frontend is None:
            found += [
                f"{named(name)} concerns the embedded frontend, but there is no --frontend"
                for name in ("migration_limit", "router_mode")
                if self.origin(name).kind == "flag"
            ]
        found += [
            f"{named('plugin', name)} and {named('no_plugin', name)} contradict each other"
            for name in sorted(set(self.plugin) & set(self.no_plugin))
        ]
        return found

    def check(self) -> None:
        """Refuse settings that contradict each other.

        :raises UsageError: naming every contradiction.
        """
        found = self.contradictions()
        if found:
            raise UsageError("\n".join(found), hint="change or remove one of the two; --print-config shows all values")


@dataclass(frozen=True)
class Origin:
    """Where a value came from: ``flag``, ``environment``, ``file`` or ``default``, and under which name."""

    kind: Literal["flag", "environment", "file", "default"]
    name: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}".strip()

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


@dataclass(frozen=True)
class Setting:
    """One row of the documentation: a field of :class:`WorkerSettings` with all its names."""

    name: str
    option: Option
    kind: Literal["value", "list", "switch"]
    choices: Sequence[str]
    default: str

    @property
    def flag(self) -> str:
        """Return the flag, ``--termination-grace-period``."""
        return flag_name(self.name)

    @property
    def flags(self) -> tuple[str, ...]:
        """Return all spellings of the flag, including the one that turns a switch off."""
        if self.kind == "switch":
            return (self.flag, f"--no-{self.flag[2:]}")
        return (f"-{self.option.short}", self.flag) if self.option.short else (self.flag,)

    @property
    def placeholder(self) -> str:
        """Return what stands for the value in ``--help``; empty for a switch."""
        if self.kind == "switch":
            return ""
        return "{" + ",".join(self.choices) + "}" if self.choices else self.option.metavar


def flag_name(field_name: str) -> str:
    """Return the flag of a field."""
    return "--" + field_name.replace("_", "-")


def documentation() -> list[Setting]:
    """Return one row for every setting, in the order in which they are documented."""
    rows = []
    for name, info in WorkerSettings.model_fields.items():
        option = next(item for item in info.metadata if isinstance(item, Option))
        default = option.default
        if default is None:
            default = "none" if info.default is None else str(_plain(info.default))
        kind: Literal["value", "list", "switch"] = "value"
        if info.annotation is bool:
            kind = "switch"
        elif name in ("plugin", "no_plugin"):
            kind = "list"
        rows.append(Setting(name, option, kind, tuple(_choices(info.annotation)), default))
    return sorted(rows, key=lambda row: GROUPS.index(row.option.group))


def markdown_table() -> str:
    """Return the documentation of all settings as Markdown, one table for each group."""
    rows = documentation()
    lines = []
    for group in GROUPS:
        lines += [
            f"## {group}",
            "",
            "| flag | environment variable | YAML key | default | meaning |",
            "|---|---|---|---|---|",
        ]
        for row in rows:
            if row.option.group == group:
                flags = ", ".join(f"`{flag}`" for flag in row.flags)
                placeholder = f" `{row.placeholder}`".replace("|", "\\|") if row.placeholder else ""
                lines.append(
                    f"| {flags}{placeholder} | `{row.option.env}` | `{row.name}` | {row.default} | {row.option.help} |"
                )
        lines.append("")
    return "\n".join(lines)


@dataclass(frozen=True)
class ConfigFile:
    """A configuration file that was read: the worker's settings and the engine's own flags."""

    path: Path
    values: Mapping[str, Any] = field(default_factory=dict)
    engine_args: Mapping[str, Any] | Sequence[Any] = ()


def read_config(path: Path) -> ConfigFile:
    """Read a YAML configuration file.

    :raises UsageError: it cannot be read, is no YAML, or has a key that does not exist.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"the configuration file {path} is not UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise UsageError(f"the configuration file {path}{where} is not valid YAML: {problem}") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UsageError(f"the configuration file {path} must hold `key: value` pairs, not a {type(content).__name__}")
    engine_args = content.pop(ENGINE_ARGS_KEY, None) or ()
    if isinstance(engine_args, str) or not isinstance(engine_args, (Mapping, Sequence)):
        raise UsageError(
            f"{path}: {ENGINE_ARGS_KEY} must be a mapping (`tensor-parallel-size: 2`) or a list of command-line words"
        )
    known = [name for name in WorkerSettings.model_fields if name != "config"]
    for key in content:
        if key not in known:
            raise UsageError(
                f"{path}: unknown key {key!r}{suggestion(str(key).replace('-', '_'), [*known, ENGINE_ARGS_KEY])}",
                hint=f"the keys are the flags with underscores; the engine's own flags belong under {ENGINE_ARGS_KEY}",
            )
    return ConfigFile(path, content, engine_args)


def load(
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    config: ConfigFile | None = None,
) -> WorkerSettings:
    """Return the settings from all sources; a flag wins over the environment, that over the file, that over a default.

    :param flags: values from the command line, by field name.
    :param environ: environment variables, ``os.environ`` by default.
    :param config: the configuration file, already read.
    :raises UsageError: a value is wrong; one line for each, naming where it came from.
    """
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    for layer in _layers(flags or {}, os.environ if environ is None else environ, config):
        for name, (value, origin) in _expand_endpoint(layer).items():
            values[name] = value
            origins[name] = origin
    try:
        settings = WorkerSettings(**values)
    except ValidationError as error:
        raise UsageError("\n".join(_explain(error, values, origins))) from error
    settings._origins.update(origins)  # noqa: SLF001 - the constructor takes settings only
    return settings


def config_path(flags: Mapping[str, Any], environ: Mapping[str, str]) -> Path | None:
    """Return the configuration file that the command line or the environment names."""
    name = flags.get("config") or environ.get(WORKER_CONFIG_ENV)
    return Path(name) if name else None


_Layer = dict[str, tuple[Any, Origin]]

WORKER_CONFIG_ENV: Final = "DYN_WORKER_CONFIG"


def _layers(flags: Mapping[str, Any], environ: Mapping[str, str], config: ConfigFile | None) -> Iterator[_Layer]:
    """Yield the values of each source with their origin, the weakest source first."""
    if config is not None:
        yield {name: (value, Origin("file", str(config.path))) for name, value in config.values.items()}
    rows = documentation()
    yield {
        row.name: (environ[row.option.env], Origin("environment", row.option.env))
        for row in rows
        if environ.get(row.option.env)
    }
    yield {
        row.name: (flags[row.name], Origin("flag", row.flags[1] if flags[row.name] is False else row.flag))
        for row in rows
        if row.name in flags
    }


def _expand_endpoint(layer: _Layer) -> _Layer:
    """Split an endpoint given as ``dyn://namespace.component.endpoint`` into its three settings."""
    value, origin = layer.get("endpoint", (None, DEFAULT))
    if not isinstance(value, str) or ("." not in value and "://" not in value):
        return layer
    parts = value.removeprefix("dyn://").split(".")
    if len(parts) != 3 or not all(parts):
        raise UsageError(
            f"{origin.describe('endpoint', value)}: must be a name, or a path dyn://namespace.component.endpoint"
        )
    layer = dict(layer)
    for name, part in zip(("namespace", "component", "endpoint"), parts, strict=True):
        given, given_origin = layer.get(name, (part, origin))
        if name != "endpoint" and given != part:
            raise UsageError(
                f"{origin.describe('endpoint', value)} and {given_origin.describe(name, given)} contradict each other"
            )
        layer[name] = (part, origin)
    return layer


def _explain(error: ValidationError, values: Mapping[str, Any], origins: Mapping[str, Origin]) -> Iterator[str]:
    """Yield one line for each wrong value."""
    choices = {row.name: row.choices for row in documentation()}
    seen = set()
    for problem in error.errors(include_url=False):
        name = str(problem["loc"][0])
        # One wrong value can fail several branches of a union; a default that depends on it fails as well.
        if name in seen or name not in origins:
            continue
        seen.add(name)
        where = origins[name].describe(name, _plain(values[name]))
        reason = problem["msg"].removeprefix("Value error, ").removeprefix("Input ").replace("should be", "must be")
        if choices[name]:
            reason = f"must be one of {', '.join(choices[name])}{suggestion(str(values[name]), choices[name])}"
        elif problem["type"] == "string_pattern_mismatch":
            reason = "must consist of letters, digits, `-` and `_`"
        elif name == "config":
            reason = "must be a file"
        yield f"{where}: {reason}"


def _choices(annotation: Any) -> Iterator[str]:
    """Yield the words of a ``Literal``, also inside a union."""
    if get_origin(annotation) is Literal:
        yield from (str(word) for word in get_args(annotation))
    elif get_origin(annotation) is not tuple:
        for inner in get_args(annotation):
            yield from _choices(inner)


def _plain(value: object) -> object:
    """Return a value as a person would write it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value == int(value):
        return int(value)
    if isinstance(value, Address):
        return str(value)
    return value
