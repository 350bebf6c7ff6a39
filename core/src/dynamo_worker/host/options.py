"""Every setting of the worker under all its names: the one place for flags, variables, YAML keys and their meaning.

Standard library only: `--help` and the documentation are made from this table without importing pydantic.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

from dynamo_worker.host.drain_mode import DrainMode

DiscoveryBackend = Literal["file", "etcd", "kubernetes", "mem"]
RequestPlane = Literal["tcp", "nats"]
EventPlane = Literal["nats", "zmq"]
RouterMode = Literal["round-robin", "random", "kv", "least-loaded"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]

#: Where ``--frontend`` without a value listens.
DEFAULT_FRONTEND: Final = "127.0.0.1:8000"

#: The largest number of migrations that the runtime takes.
MOST_MIGRATIONS: Final = 2**32 - 1

#: The key of the configuration file that holds the engine's own flags; it is no setting of the worker.
ENGINE_ARGS_KEY: Final = "engine_args"

ENGINE: Final = "Engine"
DISCOVERY: Final = "Discovery and request plane"
SHUTDOWN: Final = "Shutdown"
HEALTH: Final = "Health"
CONTROL: Final = "Control routes"
FRONTEND: Final = "Frontend"
MODEL: Final = "Model registration"
PLUGINS: Final = "Plugins"
LOGGING: Final = "Logging"

#: The headings in the order in which ``--help`` shows them.
GROUPS: Final = (ENGINE, DISCOVERY, SHUTDOWN, HEALTH, CONTROL, FRONTEND, MODEL, PLUGINS, LOGGING)


@dataclass(frozen=True)
class Option:
    """One setting: a field of ``WorkerSettings``, and what it is called from outside.

    :param name: name of the field, which is the YAML key too.
    :param group: heading under which ``--help`` and the documentation show it.
    :param help: what it does, in one sentence; the only description there is.
    :param env: its environment variable.
    :param default: its value when nobody gives one.
    :param default_text: the default in words, where the value alone does not say it.
    :param metavar: placeholder for the value.
    :param choices: all values that it can have, if they are words.
    :param kind: a ``value``, a ``list`` (repeatable flag) or a ``switch``.
    :param short: its one-letter flag.
    :param bare: the value of the flag when it stands alone; None if it needs a value.
    """

    name: str
    group: str
    help: str
    env: str
    default: Any = None
    default_text: str | None = None
    metavar: str = ""
    choices: tuple[str, ...] = ()
    kind: Literal["value", "list", "switch"] = "value"
    short: str | None = None
    bare: str | None = None

    @property
    def flag(self) -> str:
        """Return the flag, ``--termination-grace-period``."""
        return flag_name(self.name)

    @property
    def flags(self) -> tuple[str, ...]:
        """Return all spellings of the flag, including the one that turns a switch off."""
        if self.kind == "switch":
            return (self.flag, f"--no-{self.flag[2:]}")
        return (f"-{self.short}", self.flag) if self.short else (self.flag,)

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


#: All settings, in the order in which they are documented.
OPTIONS: Final = (
    Option(
        "engine",
        ENGINE,
        "The engine to run; `dynamo-worker engines` lists what is installed.",
        "DYN_WORKER_ENGINE",
        default="",
        default_text="none, required",
        metavar="NAME",
    ),
    Option(
        "config",
        ENGINE,
        "YAML file with settings; its keys are the flags with underscores, `engine_args:` holds the engine's own.",
        "DYN_WORKER_CONFIG",
        metavar="FILE",
    ),
    Option(
        "warmup",
        ENGINE,
        "Run one small request before the model is registered.",
        "DYN_WORKER_WARMUP",
        default=True,
        kind="switch",
    ),
    Option(
        "warmup_timeout",
        ENGINE,
        "Give up the start when the warm-up takes longer.",
        "DYN_WORKER_WARMUP_TIMEOUT",
        default=600.0,
        metavar="SECONDS",
    ),
    Option(
        "namespace", DISCOVERY, "Dynamo namespace of the worker.", "DYN_NAMESPACE", default="dynamo", metavar="NAME"
    ),
    Option(
        "component", DISCOVERY, "Dynamo component of the worker.", "DYN_COMPONENT", default="backend", metavar="NAME"
    ),
    Option(
        "endpoint",
        DISCOVERY,
        "Dynamo endpoint that serves the model; `dyn://namespace.component.endpoint` sets all three.",
        "DYN_ENDPOINT",
        default="generate",
        metavar="NAME",
    ),
    Option(
        "discovery_backend",
        DISCOVERY,
        "How workers and frontends find each other.",
        "DYN_DISCOVERY_BACKEND",
        default_text="file with --frontend, else etcd",
        choices=get_args(DiscoveryBackend),
    ),
    Option(
        "discovery_path",
        DISCOVERY,
        "Directory of the `file` discovery backend.",
        "DYN_FILE_KV",
        default_text="a private directory with --frontend, else Dynamo's own",
        metavar="DIR",
    ),
    Option(
        "discovery_timeout",
        DISCOVERY,
        "How long the start waits for an unreachable discovery or NATS server, and a worker that fell out of "
        "discovery tries to come back.",
        "DYN_WORKER_DISCOVERY_TIMEOUT",
        default=30.0,
        metavar="SECONDS",
    ),
    Option(
        "request_plane",
        DISCOVERY,
        "How requests reach the worker.",
        "DYN_REQUEST_PLANE",
        default="tcp",
        choices=get_args(RequestPlane),
    ),
    Option(
        "event_plane",
        DISCOVERY,
        "How KV-cache events reach the routers.",
        "DYN_EVENT_PLANE",
        default_text="Dynamo's choice",
        choices=get_args(EventPlane),
    ),
    Option(
        "drain",
        SHUTDOWN,
        "What a stop does with requests in flight: wait for them and hand off what is left at the end; hand all "
        "of them to other workers at once; end them.",
        "DYN_WORKER_DRAIN",
        default=DrainMode.COMPLETE,
        choices=tuple(mode.value for mode in DrainMode),
    ),
    Option(
        "termination_grace_period",
        SHUTDOWN,
        "Seconds from the first signal to the platform's SIGKILL: Kubernetes' terminationGracePeriodSeconds "
        "(`dynamo-worker plan` shows how it is used).",
        "DYN_WORKER_TERMINATION_GRACE_PERIOD",
        default=30.0,
        metavar="SECONDS",
    ),
    Option(
        "grace_period",
        SHUTDOWN,
        "Seconds to go on serving after leaving discovery, for routers that have not noticed yet.",
        "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS",
        default_text="5 with --drain complete, else 0",
        metavar="SECONDS",
    ),
    Option(
        "engine_shutdown_timeout",
        SHUTDOWN,
        "Longest time for one plugin's cleanup hook.",
        "ENGINE_SHUTDOWN_TIMEOUT",
        default=30.0,
        metavar="SECONDS",
    ),
    Option(
        "termination_message_path",
        SHUTDOWN,
        "File that receives one line of cause at the end, if it exists.",
        "DYN_WORKER_TERMINATION_MESSAGE_PATH",
        default=Path("/dev/termination-log"),
        metavar="FILE",
    ),
    Option(
        "health_check_interval",
        HEALTH,
        "Seconds between two health checks of the engine.",
        "DYN_ENGINE_HEALTH_CHECK_INTERVAL",
        default=2.0,
        metavar="SECONDS",
    ),
    Option(
        "health_check_timeout",
        HEALTH,
        "Longest time for one health check.",
        "DYN_ENGINE_HEALTH_CHECK_TIMEOUT",
        default=30.0,
        metavar="SECONDS",
    ),
    Option(
        "stall_timeout",
        HEALTH,
        "End the worker when the engine hangs this long: no progress of any kind and no answer to a canary "
        "request (0: never).",
        "DYN_WORKER_STALL_TIMEOUT",
        default=30.0,
        metavar="SECONDS",
    ),
    Option(
        "heartbeat_timeout",
        HEALTH,
        "Kill the worker when its event loop is stuck this long while it serves (0: never).",
        "DYN_WORKER_HEARTBEAT_TIMEOUT",
        default=25.0,
        metavar="SECONDS",
    ),
    Option(
        "slow_client_timeout",
        HEALTH,
        "Cancel a request whose client has not read for this long while megabytes wait for it (0: never).",
        "DYN_WORKER_SLOW_CLIENT_TIMEOUT",
        default=60.0,
        metavar="SECONDS",
    ),
    Option(
        "system_host",
        HEALTH,
        "Address of the server for /health, /live and /metrics.",
        "DYN_SYSTEM_HOST",
        default_text="127.0.0.1 with a --frontend on loopback (not in Kubernetes), else 0.0.0.0",
        metavar="HOST",
    ),
    Option(
        "system_port",
        HEALTH,
        "Port of that server (-1: no server, 0: any free port).",
        "DYN_SYSTEM_PORT",
        default=-1,
        metavar="PORT",
    ),
    Option(
        "control_token_file",
        CONTROL,
        "File with a token that every call of a control route has to carry; `DYN_WORKER_CONTROL_TOKEN` can hold the "
        "token itself.",
        "DYN_WORKER_CONTROL_TOKEN_FILE",
        metavar="FILE",
    ),
    Option(
        "control_load_root",
        CONTROL,
        "Directory, or URI such as `s3://bucket/adapters`, below which operations may load LoRA adapters and weights; "
        "without one they may not (repeatable).",
        "DYN_WORKER_CONTROL_LOAD_ROOT",
        default=(),
        default_text="none",
        metavar="DIR",
        kind="list",
    ),
    Option(
        "control_write_root",
        CONTROL,
        "Directory below which operations may write what they are told to, profiles for one; without one they may not "
        "(repeatable).",
        "DYN_WORKER_CONTROL_WRITE_ROOT",
        default=(),
        default_text="none",
        metavar="DIR",
        kind="list",
    ),
    Option(
        "frontend",
        FRONTEND,
        f"Run an OpenAI HTTP frontend beside the worker; alone it listens on {DEFAULT_FRONTEND}.",
        "DYN_WORKER_FRONTEND",
        default_text="no frontend",
        metavar="[HOST:PORT]",
        bare=DEFAULT_FRONTEND,
    ),
    Option(
        "migration_limit",
        FRONTEND,
        "How often the embedded frontend moves one request to another worker.",
        "DYN_MIGRATION_LIMIT",
        default=3,
        metavar="N",
    ),
    Option(
        "router_mode",
        FRONTEND,
        "How the embedded frontend picks a worker.",
        "DYN_ROUTER_MODE",
        default="round-robin",
        choices=get_args(RouterMode),
    ),
    Option(
        "tool_call_parser",
        MODEL,
        "Parser of the frontend for tool calls in the output.",
        "DYN_TOOL_CALL_PARSER",
        metavar="NAME",
    ),
    Option(
        "reasoning_parser",
        MODEL,
        "Parser of the frontend for reasoning in the output.",
        "DYN_REASONING_PARSER",
        metavar="NAME",
    ),
    Option(
        "custom_jinja_template",
        MODEL,
        "Chat template to use instead of the model's own.",
        "DYN_CUSTOM_JINJA_TEMPLATE",
        default_text="the model's",
        metavar="FILE",
    ),
    Option(
        "endpoint_types",
        MODEL,
        "OpenAI surfaces to register the model for, separated by commas (chat, completions, embedding, …).",
        "DYN_ENDPOINT_TYPES",
        default=(),
        default_text="what the engine offers",
        metavar="LIST",
    ),
    Option(
        "plugin",
        PLUGINS,
        "Load a plugin from a module that needs no packaging; the current directory is searched first (repeatable).",
        "DYN_WORKER_PLUGIN",
        default=(),
        default_text="none",
        metavar="MODULE",
        kind="list",
        short="p",
    ),
    Option(
        "installed_plugins",
        PLUGINS,
        "Which installed plugins are loaded: `all`, `none`, or names separated by commas. Others are not even "
        "imported; the engine always is.",
        "DYN_WORKER_INSTALLED_PLUGINS",
        default=("all",),
        default_text="all",
        metavar="LIST",
    ),
    Option(
        "no_plugin",
        PLUGINS,
        "Leave out an installed plugin (repeatable).",
        "DYN_WORKER_NO_PLUGIN",
        default=(),
        default_text="none",
        metavar="NAME",
        kind="list",
    ),
    Option(
        "log_level",
        LOGGING,
        "Least severity that is logged.",
        "DYN_WORKER_LOG_LEVEL",
        default="info",
        choices=get_args(LogLevel),
    ),
    Option(
        "log_format",
        LOGGING,
        "Lines for people, or one JSON object a line.",
        "DYN_WORKER_LOG_FORMAT",
        default="text",
        choices=get_args(LogFormat),
    ),
)

BY_NAME: Final = {option.name: option for option in OPTIONS}


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


def markdown_table() -> str:
    """Return the documentation of all settings as Markdown, one table for each group."""
    lines = []
    for group in GROUPS:
        lines += [
            f"## {group}",
            "",
            "| flag | environment variable | YAML key | default | meaning |",
            "|---|---|---|---|---|",
        ]
        for row in OPTIONS:
            if row.group == group:
                flags = ", ".join(f"`{flag}`" for flag in row.flags)
                placeholder = f" `{row.placeholder}`".replace("|", "\\|") if row.placeholder else ""
                lines.append(
                    f"| {flags}{placeholder} | `{row.env}` | `{row.name}` | {row.shown_default} | {row.help} |"
                )
        lines.append("")
    return "\n".join(lines)
