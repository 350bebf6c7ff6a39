"""The worker's settings: one model, filled from flags, environment and a YAML file, that remembers each origin."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import Field, PrivateAttr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from dynamo_worker.address import LOOPBACK, Address, resolve
from dynamo_worker.errors import UsageError
from dynamo_worker.host.config import place
from dynamo_worker.host.config.drain_mode import DrainMode
from dynamo_worker.host.config.logging_options import (  # noqa: TC001 - pydantic evaluates the annotations
    LogFormat,
    LogLevel,
)
from dynamo_worker.host.config.model_options import (  # noqa: TC001 - pydantic evaluates the annotations
    StructuralTagSchema,
    StructuralTagScope,
    ThinkingMode,
)
from dynamo_worker.host.config.option_types import plain
from dynamo_worker.host.config.options import (
    BY_NAME,
    OPTIONS,
    DiscoveryBackend,
    EventPlane,
    RequestPlane,
    RouterMode,
)
from dynamo_worker.host.config.origins import DEFAULT, Origin
from dynamo_worker.host.config.setting_types import (  # noqa: TC001 - pydantic evaluates the annotations
    EndpointPath,
    EndpointTypes,
    FrontendAddress,
    InstalledPlugins,
    LoadRoots,
    PathPart,
    StructuralTag,
    Words,
    WriteRoots,
)
from dynamo_worker.host.config.shutdown_plan import ShutdownPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from dynamo_worker.host.config.config_file import ConfigFile
    from dynamo_worker.host.config.place import Layer

#: Names the configuration file.
CONFIG_VARIABLE: Final = BY_NAME["config"].env

#: Messages for users, by pydantic's error types.
_EXPECTED: Final = {
    "bool_parsing": "expected true or false",
    "bool_type": "expected true or false",
    "path_type": "expected a path",
    "string_pattern_mismatch": "expected letters, digits, `-` and `_`, starting with a letter or a digit",
    "string_type": "expected a string (in YAML, put it in quotes)",
    "tuple_type": "expected a list",
}


def _status_host(frontend: Address | None) -> str:
    """Return the default address of the status server.

    Probes come from other machines, unless the frontend serves this machine only. In a pod, they always do.
    """
    local = frontend is not None and frontend.local and "KUBERNETES_SERVICE_HOST" not in os.environ
    return LOOPBACK if local else "0.0.0.0"  # noqa: S104 - as in Dynamo


def _drain_mode(data: Mapping[str, Any]) -> DrainMode:
    """Return the validated drain mode; any mode if the given one was rejected."""
    mode: DrainMode = data.get("drain", DrainMode.COMPLETE)
    return mode


def _option(name: str, default_factory: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Return the field for an option.

    :param default_factory: computes a default that depends on the fields above.
    """
    option = BY_NAME[name]
    if default_factory is not None:
        return Field(default_factory=default_factory, description=option.help)
    return Field(default=option.default, description=option.help)


class WorkerSettings(BaseSettings):
    """All settings of a worker. Use :func:`load`; ``WorkerSettings(...)`` takes values only, for tests.

    Unlike other pydantic-settings models, it reads no source itself: :func:`load` reads them one by one to record
    where each value came from.
    """

    model_config = SettingsConfigDict(frozen=True, extra="forbid", validate_default=False)

    # --- Engine
    engine: str = _option("engine")
    config: Path | None = _option("config")
    warmup: bool = _option("warmup")
    warmup_timeout: float = _option("warmup_timeout")

    # --- Frontend (here because the discovery backend depends on it)
    frontend: FrontendAddress = _option("frontend")
    migration_limit: int = _option("migration_limit")
    router_mode: RouterMode = _option("router_mode")

    # --- Discovery and request plane
    namespace: PathPart = _option("namespace")
    namespace_worker_suffix: PathPart | None = _option("namespace_worker_suffix")
    component: PathPart = _option("component")
    endpoint: PathPart = _option("endpoint")
    discovery_backend: DiscoveryBackend = _option(
        "discovery_backend", lambda data: "file" if data.get("frontend") else "etcd"
    )
    discovery_path: Path | None = _option("discovery_path")
    discovery_timeout: float = _option("discovery_timeout")
    discovery_outage: float = _option("discovery_outage")
    etcd_lease_ttl: float = _option("etcd_lease_ttl")
    request_plane: RequestPlane = _option("request_plane")
    event_plane: EventPlane | None = _option("event_plane")

    # --- Shutdown
    drain: DrainMode = _option("drain")
    termination_grace_period: float = _option("termination_grace_period")
    grace_period: float = _option("grace_period", lambda data: _drain_mode(data).default_grace_period)
    engine_shutdown_timeout: float = _option("engine_shutdown_timeout")
    termination_message_path: Path = _option("termination_message_path")

    # --- Health
    health_check_interval: float = _option("health_check_interval")
    health_check_timeout: float = _option("health_check_timeout")
    stall_timeout: float = _option("stall_timeout")
    stall_timeout_busy: float = _option("stall_timeout_busy")
    heartbeat_timeout: float = _option("heartbeat_timeout")
    slow_client_timeout: float = _option("slow_client_timeout")
    system_host: str = _option("system_host", lambda data: _status_host(data.get("frontend")))
    system_port: int = _option("system_port")

    # --- Control routes
    control_token_file: Path | None = _option("control_token_file")
    control_load_root: LoadRoots = _option("control_load_root")
    control_write_root: WriteRoots = _option("control_write_root")

    # --- Model registration
    tool_call_parser: str | None = _option("tool_call_parser")
    reasoning_parser: str | None = _option("reasoning_parser")
    default_thinking_mode: ThinkingMode | None = _option("default_thinking_mode")
    exclude_tools_when_tool_choice_none: bool = _option("exclude_tools_when_tool_choice_none")
    structural_tag: StructuralTag = _option("structural_tag")
    enable_structural_tag: bool | None = _option("enable_structural_tag")
    structural_tag_scope: StructuralTagScope | None = _option("structural_tag_scope")
    structural_tag_schema: StructuralTagSchema | None = _option("structural_tag_schema")
    custom_jinja_template: Path | None = _option("custom_jinja_template")
    endpoint_types: EndpointTypes = _option("endpoint_types")
    kv_state_endpoint: EndpointPath = _option("kv_state_endpoint")

    # --- Plugins
    plugin: Words = _option("plugin")
    installed_plugins: InstalledPlugins = _option("installed_plugins")
    no_plugin: Words = _option("no_plugin")

    # --- Logging
    dump_config_to: Path | None = _option("dump_config_to")
    record_dir: Path | None = _option("record_dir")
    record_keep: int = _option("record_keep")
    log_level: LogLevel = _option("log_level")
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
        """Use only the values that :func:`load` has collected."""
        return (init_settings,)

    @field_validator("*", mode="before")
    @classmethod
    def _check_option(cls, value: object, info: ValidationInfo) -> object:
        """Apply the limits that the option declares."""
        assert info.field_name is not None
        return BY_NAME[info.field_name].parse(value)

    def origin(self, name: str) -> Origin:
        """Return where the value of a field came from."""
        return self._origins.get(name, DEFAULT)

    @property
    def on_loopback(self) -> bool:
        """Whether this worker's frontend is reachable from this machine only."""
        return self.frontend is not None and self.frontend.local

    @property
    def events_wanted(self) -> bool:
        """Whether a router may read KV events and load: a remote one, or that of this worker's own frontend."""
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

    def without_handoff(self) -> WorkerSettings:
        """Return these settings with ``--drain complete``, and its grace period unless one was chosen."""
        mode = DrainMode.COMPLETE
        chosen = "grace_period" in self.model_fields_set
        grace = self.grace_period if chosen else mode.default_grace_period
        return self.model_copy(update={"drain": mode, "grace_period": grace})

    def contradictions(self) -> list[str]:
        """Return the conflicts between settings, one sentence each."""
        found = []

        def named(name: str, value: object = None) -> str:
            """Return a setting as the user wrote it."""
            shown = getattr(self, name) if value is None else value
            return self.origin(name).describe(name, _shown(shown))

        plan = self.shutdown_plan
        if not plan.fits:
            found.append(
                f"{named('termination_grace_period')} conflicts with {named('grace_period')}: {plan.warnings[0]}"
            )
        if self.discovery_backend == "mem":
            other = f" conflicts with {named('frontend')}" if self.frontend else " isolates the worker"
            found.append(
                f"{named('discovery_backend')}{other}: `mem` discovery does not reach beyond one process, so no "
                "frontend can find the worker"
            )
        # DYN_FILE_KV may be set for a whole cluster; a flag or a key in the file is meant for this worker.
        if self.discovery_backend != "file" and self.origin("discovery_path").kind in ("flag", "file"):
            found.append(
                f"{named('discovery_path')} requires the `file` discovery backend, but the backend is "
                f"{self.discovery_backend} ({self.origin('discovery_backend')})"
            )
        if self.frontend is not None and self.frontend.port == self.system_port != 0:
            found.append(f"{named('frontend')} conflicts with {named('system_port')}: they use the same port")
        if self.system_port < 0 and self.origin("control_token_file").kind in ("flag", "file"):
            found.append(
                f"{named('control_token_file')} has no effect without --system-port, which serves the control routes"
            )
        if self.frontend is None:
            found += [
                f"{named(name)} has no effect without --frontend"
                for name in ("migration_limit",)
                if self.origin(name).kind == "flag"
            ]
        enabled = self.structural_tag is not None and self.structural_tag is not False
        if self.structural_tag is not None:
            found += [
                f"{named('structural_tag')} conflicts with {named(name)}: --dyn-structural-tag replaces the older flags"
                for name in ("enable_structural_tag", "structural_tag_scope", "structural_tag_schema")
                if getattr(self, name) not in (None, enabled)
            ]
        found += [
            f"{named('plugin', name)} conflicts with {named('no_plugin', name)}"
            for name in sorted(set(self.plugin) & set(self.no_plugin))
        ]
        found += [
            f"{named('installed_plugins')} conflicts with {named('no_plugin', name)}"
            for name in sorted(set(self.installed_plugins) & set(self.no_plugin))
        ]
        return found

    def resolved(self) -> WorkerSettings:
        """Return the settings with host names resolved to IP addresses.

        :raises UsageError: a host name cannot be resolved.
        """
        resolved: dict[str, Any] = {}
        if self.frontend is not None:
            named = self.origin("frontend").describe("frontend", str(self.frontend))
            resolved["frontend"] = Address(resolve(self.frontend.host, named), self.frontend.port)
        if self.system_port >= 0:
            named = self.origin("system_host").describe("system_host", self.system_host)
            resolved["system_host"] = resolve(self.system_host, named)
        return self.model_copy(update=resolved)

    def for_role(self, mode: str | None) -> WorkerSettings:
        """Return the settings with the component of a worker for one phase of requests, unless it was given.

        :param mode: the phase, ``prefill`` or ``decode``, or anything else for a worker of both.
        """
        component = place.COMPONENTS.get(mode or "")
        if component is None or self.origin("component") != DEFAULT:
            return self
        settings = self.model_copy(update={"component": component})
        settings._origins = {**self._origins, "component": Origin("default", note=f"of a {mode} worker")}  # noqa: SLF001
        return settings

    def check(self) -> None:
        """Refuse conflicting settings.

        :raises UsageError: settings conflict; the message has one line per conflict.
        """
        found = self.contradictions()
        if found:
            raise UsageError("\n".join(found), hint="change or remove one of the two; --print-config shows all values")


def load(
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    config: ConfigFile | None = None,
    spelled: Mapping[str, str] | None = None,
) -> WorkerSettings:
    """Return the settings from all sources. Flags take precedence over the environment, that over the file.

    :param flags: values from the command line, by field name.
    :param environ: environment variables, ``os.environ`` by default.
    :param config: the configuration file, already read.
    :param spelled: the flag that gave a value, for messages, where it is not the option's first one.
    :raises UsageError: a value is invalid; the message has one line per value and names its origin.
    """
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    for layer in _layers(flags or {}, os.environ if environ is None else environ, config, spelled or {}):
        for name, (value, origin) in place.expanded(layer).items():
            values[name] = value
            origins[name] = origin
    place.append_suffix(values, origins)
    try:
        settings = WorkerSettings(**values)
    except ValidationError as error:
        raise UsageError("\n".join(_explain(error, values, origins))) from error
    settings._origins.update(origins)  # noqa: SLF001 - the constructor takes settings only
    return settings


def config_path(flags: Mapping[str, Any], environ: Mapping[str, str]) -> Path | None:
    """Return the path of the configuration file, from the command line or the environment."""
    name = flags.get("config") or environ.get(CONFIG_VARIABLE)
    return Path(name) if name else None


def _layers(
    flags: Mapping[str, Any], environ: Mapping[str, str], config: ConfigFile | None, spelled: Mapping[str, str]
) -> Iterator[Layer]:
    """Yield the values of each source with their origin, lowest precedence first."""
    if config is not None:
        yield {name: (value, Origin("file", str(config.path))) for name, value in config.values.items()}
    yield {row.name: (environ[row.env], Origin("environment", row.env)) for row in OPTIONS if environ.get(row.env)}
    yield {
        row.name: (flags[row.name], Origin("flag", spelled.get(row.name, row.flag)))
        for row in OPTIONS
        if row.name in flags
    }


def _explain(error: ValidationError, values: Mapping[str, Any], origins: Mapping[str, Origin]) -> Iterator[str]:
    """Yield one line for each invalid value."""
    seen = set()
    for problem in error.errors(include_url=False):
        name = str(problem["loc"][0])
        # One invalid value can fail several branches of a union; a default that depends on it fails as well.
        if name in seen or name not in origins:
            continue
        seen.add(name)
        reason = _EXPECTED.get(problem["type"]) or problem["msg"].removeprefix("Value error, ")
        yield f"{origins[name].describe(name, _shown(values[name]))}: {reason}"


def _shown(value: object) -> object:
    return str(value) if isinstance(value, Address) else plain(value)
