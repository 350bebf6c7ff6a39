"""The worker's settings: one model, filled from flags, environment and a YAML file; it knows what came from where."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from annotated_types import Ge, Le
from pydantic import AfterValidator, AllowInfNan, BeforeValidator, Field, PlainSerializer, PrivateAttr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from dynamo_worker.address import LOOPBACK, Address, resolve
from dynamo_worker.allowed_paths import check_load_roots, check_write_roots
from dynamo_worker.errors import UsageError
from dynamo_worker.host.drain_mode import DrainMode
from dynamo_worker.host.options import (
    BY_NAME,
    DEFAULT_FRONTEND,
    ENGINE_ARGS_KEY,
    MOST_MIGRATIONS,
    OPTIONS,
    DiscoveryBackend,
    EventPlane,
    LogFormat,
    LogLevel,
    RequestPlane,
    RouterMode,
    flag_name,
    plain,
)
from dynamo_worker.host.shutdown_plan import ShutdownPlan
from dynamo_worker.suggest import suggestion

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
    return Address.parse(text, DEFAULT_FRONTEND)


def _status_host(frontend: Address | None) -> str:
    """Return where the status server listens if nobody says: probes come from outside, unless all there is, is here.

    In a pod they come from outside whatever the frontend's address is.
    """
    local = frontend is not None and frontend.local and "KUBERNETES_SERVICE_HOST" not in os.environ
    return LOOPBACK if local else "0.0.0.0"  # noqa: S104 - as in Dynamo


def _check_endpoint_types(value: object) -> object:
    types = _split_list(value)
    if isinstance(types, tuple):
        for name in types:
            if name not in ENDPOINT_TYPES:
                raise ValueError(f"{name!r} is none of {', '.join(ENDPOINT_TYPES)}{suggestion(name, ENDPOINT_TYPES)}")
    return types


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _not_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number, not a yes or no")
    return value


Words = Annotated[tuple[str, ...], BeforeValidator(_split_list)]


def _check_patience(value: float) -> float:
    """Refuse a time within which a healthy worker may well be silent."""
    if 0 < value < 1:
        raise ValueError("must be at least 1, or 0 for never: a healthy worker would be killed")
    return value


#: YAML reads `yes` and `on` as true, which would pass for 1.
_NUMBER: Final = BeforeValidator(_not_boolean)
#: Longer than a week is a mistake in the unit, or meant as "never".
_MOST_SECONDS: Final = 7 * 24 * 3600
Seconds = Annotated[float, AllowInfNan(False), Ge(0), Le(_MOST_SECONDS), _NUMBER]
#: Less than a hundredth of a second is over before anything can happen in it.
PositiveSeconds = Annotated[float, AllowInfNan(False), Ge(0.01), Le(_MOST_SECONDS), _NUMBER]
#: Silence after which a worker is given up.
Patience = Annotated[Seconds, AfterValidator(_check_patience)]
#: One part of ``namespace.component.endpoint``.
PathPart = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


def _check_installed_plugins(names: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse what could be meant in two ways."""
    if not names:
        raise ValueError("must be `all`, `none`, or names separated by commas")
    if len(names) > 1 and {"all", "none"}.intersection(names):
        raise ValueError("`all` and `none` stand alone")
    return names


def _drain_mode(data: Mapping[str, Any]) -> DrainMode:
    """Return the drain mode among validated values; any, if the given one was refused."""
    mode: DrainMode = data.get("drain", DrainMode.COMPLETE)
    return mode


def _option(name: str, default_factory: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Return the field for an option.

    :param default_factory: makes a default that depends on the fields above it.
    """
    option = BY_NAME[name]
    if default_factory is not None:
        return Field(default_factory=default_factory, description=option.help)
    return Field(default=option.default, description=option.help)


class WorkerSettings(BaseSettings):
    """All settings of a worker. Made by :func:`load`; ``WorkerSettings(...)`` takes values only, for tests.

    Unlike other pydantic-settings models it reads nothing by itself: :func:`load` asks the sources one by one, so
    that it knows where every value came from.
    """

    model_config = SettingsConfigDict(frozen=True, extra="forbid", validate_default=False)

    # --- Engine
    engine: str = _option("engine")
    config: Path | None = _option("config")
    warmup: bool = _option("warmup")
    warmup_timeout: PositiveSeconds = _option("warmup_timeout")

    # --- Frontend (here because the discovery backend depends on it)
    frontend: Annotated[
        Address | None,
        BeforeValidator(_parse_address),
        PlainSerializer(lambda value: None if value is None else str(value)),
    ] = _option("frontend")
    migration_limit: Annotated[int, Ge(0), Le(MOST_MIGRATIONS), _NUMBER] = _option("migration_limit")
    router_mode: RouterMode = _option("router_mode")

    # --- Discovery and request plane
    namespace: PathPart = _option("namespace")
    component: PathPart = _option("component")
    endpoint: PathPart = _option("endpoint")
    discovery_backend: DiscoveryBackend = _option(
        "discovery_backend", lambda data: "file" if data.get("frontend") else "etcd"
    )
    discovery_path: Path | None = _option("discovery_path")
    discovery_timeout: PositiveSeconds = _option("discovery_timeout")
    request_plane: RequestPlane = _option("request_plane")
    event_plane: EventPlane | None = _option("event_plane")

    # --- Shutdown
    drain: DrainMode = _option("drain")
    termination_grace_period: PositiveSeconds = _option("termination_grace_period")
    grace_period: Seconds = _option("grace_period", lambda data: _drain_mode(data).default_grace_period)
    engine_shutdown_timeout: PositiveSeconds = _option("engine_shutdown_timeout")
    termination_message_path: Path = _option("termination_message_path")

    # --- Health
    health_check_interval: PositiveSeconds = _option("health_check_interval")
    health_check_timeout: PositiveSeconds = _option("health_check_timeout")
    stall_timeout: Patience = _option("stall_timeout")
    heartbeat_timeout: Patience = _option("heartbeat_timeout")
    slow_client_timeout: Patience = _option("slow_client_timeout")
    system_host: str = _option("system_host", lambda data: _status_host(data.get("frontend")))
    system_port: Annotated[int, Ge(-1), Le(65535), _NUMBER] = _option("system_port")

    # --- Control routes
    control_token_file: Path | None = _option("control_token_file")
    control_load_root: Annotated[Words, AfterValidator(check_load_roots)] = _option("control_load_root")
    control_write_root: Annotated[Words, AfterValidator(check_write_roots)] = _option("control_write_root")

    # --- Model registration
    tool_call_parser: str | None = _option("tool_call_parser")
    reasoning_parser: str | None = _option("reasoning_parser")
    custom_jinja_template: Path | None = _option("custom_jinja_template")
    endpoint_types: Annotated[tuple[str, ...], BeforeValidator(_check_endpoint_types)] = _option("endpoint_types")

    # --- Plugins
    plugin: Words = _option("plugin")
    installed_plugins: Annotated[Words, AfterValidator(_check_installed_plugins)] = _option("installed_plugins")
    no_plugin: Words = _option("no_plugin")

    # --- Logging
    log_level: Annotated[LogLevel, BeforeValidator(_lower)] = _option("log_level")
    log_format: LogFormat = _option("log_format")

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

    @property
    def on_loopback(self) -> bool:
        """Whether this worker serves a frontend that only this machine can reach."""
        return self.frontend is not None and self.frontend.local

    @property
    def events_wanted(self) -> bool:
        """Whether a router may read KV events and load: one elsewhere, or that of this worker's own frontend."""
        return not self.on_loopback or self.router_mode in ("kv", "least-loaded")

    @property
    def shutdown_plan(self) -> ShutdownPlan:
        """The stages of a shutdown with these settings."""
        return ShutdownPlan.divide(
            total=self.termination_grace_period,
            grace=self.grace_period,
            cleanup_limit=self.engine_shutdown_timeout,
            mode=self.drain,
        )

    def contradictions(self) -> list[str]:
        """Return what in these settings cannot be meant together, one sentence each."""
        found = []

        def named(name: str, value: object = None) -> str:
            """Return a setting under the name by which the user gave it."""
            shown = getattr(self, name) if value is None else value
            return self.origin(name).describe(name, _shown(shown))

        plan = self.shutdown_plan
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
        if self.system_port < 0 and self.origin("control_token_file").kind in ("flag", "file"):
            found.append(f"{named('control_token_file')} guards the control routes, but there is no --system-port")
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
        found += [
            f"{named('installed_plugins')} and {named('no_plugin', name)} contradict each other"
            for name in sorted(set(self.installed_plugins) & set(self.no_plugin))
        ]
        return found

    def resolved(self) -> WorkerSettings:
        """Return the settings with IP addresses in place of host names.

        :raises UsageError: a name does not resolve.
        """
        resolved: dict[str, Any] = {}
        if self.frontend is not None:
            named = self.origin("frontend").describe("frontend", str(self.frontend))
            resolved["frontend"] = Address(resolve(self.frontend.host, named), self.frontend.port)
        if self.system_port >= 0:
            named = self.origin("system_host").describe("system_host", self.system_host)
            resolved["system_host"] = resolve(self.system_host, named)
        return self.model_copy(update=resolved)

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

    class Loader(yaml.SafeLoader):
        """YAML lets a later key win over an equal one, without a word."""

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            lines: dict[tuple[str, str], int] = {}
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                    name = (key.tag, key.value)
                    if name in lines:
                        problem = f"the key {key.value!r} is already given in line {lines[name]}"
                        raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
                    lines[name] = key.start_mark.line + 1
            return node

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)  # noqa: S506 - a safe loader
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
    yield {row.name: (environ[row.env], Origin("environment", row.env)) for row in OPTIONS if environ.get(row.env)}
    yield {
        row.name: (flags[row.name], Origin("flag", row.flags[1] if flags[row.name] is False else row.flag))
        for row in OPTIONS
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
    seen = set()
    for problem in error.errors(include_url=False):
        name = str(problem["loc"][0])
        # One wrong value can fail several branches of a union; a default that depends on it fails as well.
        if name in seen or name not in origins:
            continue
        seen.add(name)
        where = origins[name].describe(name, _shown(values[name]))
        reason = problem["msg"].removeprefix("Value error, ").removeprefix("Input ").replace("should be", "must be")
        if BY_NAME[name].choices:
            choices = BY_NAME[name].choices
            reason = f"must be one of {', '.join(choices)}{suggestion(str(values[name]), choices)}"
        elif problem["type"] == "string_pattern_mismatch":
            reason = "must consist of letters, digits, `-` and `_`"
        elif name == "config":
            reason = "must be a file"
        yield f"{where}: {reason}"


def _shown(value: object) -> object:
    return str(value) if isinstance(value, Address) else plain(value)
