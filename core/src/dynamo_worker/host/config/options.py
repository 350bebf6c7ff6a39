"""All options of the worker and of `dynamo-worker frontend`: the one place that declares names, defaults and help.

Standard library only: `--help` and the documentation are built from this table without importing pydantic.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final, Literal, get_args

from dynamo_worker.host.config.drain_mode import DrainMode
from dynamo_worker.host.config.logging_options import LOGGING_OPTIONS
from dynamo_worker.host.config.model_options import MODEL_OPTIONS
from dynamo_worker.host.config.option_types import (
    CONTROL,
    DISCOVERY,
    ENGINE,
    FRONTEND,
    GROUPS,
    HEALTH,
    PLUGINS,
    SHUTDOWN,
    Number,
    Option,
)
from dynamo_worker.host.config.runtime_options import RUNTIME_OPTIONS

DiscoveryBackend = Literal["file", "etcd", "kubernetes", "mem"]
RequestPlane = Literal["tcp", "nats"]
EventPlane = Literal["nats", "zmq"]
RouterMode = Literal["round-robin", "random", "kv", "least-loaded"]

#: The address for ``--frontend`` without a value.
DEFAULT_FRONTEND: Final = "127.0.0.1:8000"

#: More than a week is a wrong unit, or meant as "never".
_WEEK: Final = 7 * 24 * 3600
SECONDS: Final = Number(0, _WEEK, "seconds")
#: Nothing can happen in less than a hundredth of a second.
_POSITIVE_SECONDS: Final = Number(0.01, _WEEK, "seconds")
#: A healthy worker may well be silent for less than a second.
_PATIENCE: Final = Number(1, _WEEK, "seconds", never=True)

#: The key of the configuration file that holds the engine's own flags.
ENGINE_ARGS_KEY: Final = "engine_args"

#: All settings of the worker, in the order in which they are documented.
OPTIONS: Final = (
    Option(
        "engine",
        ENGINE,
        "Engine to run; `dynamo-worker engines` lists the installed ones.",
        "DYN_WORKER_ENGINE",
        default="",
        default_text="none; required",
        metavar="NAME",
    ),
    Option(
        "config",
        ENGINE,
        "YAML file with settings. Keys are flag names with underscores; `engine_args:` holds the engine's own flags.",
        "DYN_WORKER_CONFIG",
        metavar="FILE",
        alias="--worker-config",
    ),
    Option(
        "warmup",
        ENGINE,
        "Run one small request before registering the model.",
        "DYN_WORKER_WARMUP",
        default=True,
        kind="switch",
    ),
    Option(
        "warmup_timeout",
        ENGINE,
        "Fail the start if the warm-up takes longer than this.",
        "DYN_WORKER_WARMUP_TIMEOUT",
        default=600.0,
        metavar="SECONDS",
        number=_POSITIVE_SECONDS,
    ),
    Option(
        "namespace", DISCOVERY, "Dynamo namespace of the worker.", "DYN_NAMESPACE", default="dynamo", metavar="NAME"
    ),
    Option(
        "namespace_worker_suffix",
        DISCOVERY,
        "Append `-SUFFIX` to the namespace unless it is already there; Dynamo's operator sets it during a rollout.",
        "DYN_NAMESPACE_WORKER_SUFFIX",
        metavar="SUFFIX",
    ),
    Option(
        "component",
        DISCOVERY,
        "Dynamo component of the worker. The variable is ignored if it is `worker`, `prefill` or `decode`, the words "
        "of Dynamo's operator for a kind of pod.",
        "DYN_COMPONENT",
        default="backend",
        default_text="backend; of a prefill worker, prefill",
        metavar="NAME",
    ),
    Option(
        "endpoint",
        DISCOVERY,
        "Dynamo endpoint that serves the model; `dyn://namespace.component.endpoint` sets all three names.",
        "DYN_ENDPOINT",
        default="generate",
        metavar="NAME",
    ),
    Option(
        "discovery_backend",
        DISCOVERY,
        "How workers and frontends discover each other.",
        "DYN_DISCOVERY_BACKEND",
        default_text="file with --frontend, otherwise etcd",
        choices=get_args(DiscoveryBackend),
    ),
    Option(
        "discovery_path",
        DISCOVERY,
        "Directory for the `file` discovery backend.",
        "DYN_FILE_KV",
        default_text="a private directory with --frontend, otherwise Dynamo's own",
        metavar="DIR",
    ),
    Option(
        "discovery_timeout",
        DISCOVERY,
        "How long to wait at the start for an unreachable discovery or NATS server, and how long a worker that lost "
        "its registration tries to restore it.",
        "DYN_WORKER_DISCOVERY_TIMEOUT",
        default=30.0,
        metavar="SECONDS",
        number=_POSITIVE_SECONDS,
    ),
    Option(
        "discovery_outage",
        DISCOVERY,
        "How long to keep serving while etcd does not answer; after that the process exits with code 4.",
        "DYN_WORKER_DISCOVERY_OUTAGE",
        default=600.0,
        metavar="SECONDS",
        number=_POSITIVE_SECONDS,
    ),
    Option(
        "etcd_lease_ttl",
        DISCOVERY,
        "How long the worker's entries stay in etcd without a sign of life. Only a killed container or machine takes "
        "that long: a dead process is withdrawn at once.",
        "ETCD_LEASE_TTL",
        default=60.0,
        metavar="SECONDS",
        number=Number(5, _WEEK, "seconds"),
    ),
    Option(
        "request_plane",
        DISCOVERY,
        "Transport for requests to the worker.",
        "DYN_REQUEST_PLANE",
        default="tcp",
        choices=get_args(RequestPlane),
    ),
    Option(
        "event_plane",
        DISCOVERY,
        "Transport for KV-cache events to the routers.",
        "DYN_EVENT_PLANE",
        default_text="Dynamo's choice",
        choices=get_args(EventPlane),
    ),
    Option(
        "drain",
        SHUTDOWN,
        "What a shutdown does with requests in flight: let them finish, and hand off those that do not; hand them all "
        "off to other workers at once; or abort them.",
        "DYN_WORKER_DRAIN",
        default=DrainMode.COMPLETE,
        choices=tuple(mode.value for mode in DrainMode),
    ),
    Option(
        "termination_grace_period",
        SHUTDOWN,
        "Time from the first signal to the platform's SIGKILL; set it to Kubernetes' terminationGracePeriodSeconds "
        "(`dynamo-worker plan` shows how it is used).",
        "DYN_WORKER_TERMINATION_GRACE_PERIOD",
        default=30.0,
        metavar="SECONDS",
        number=_POSITIVE_SECONDS,
    ),
    Option(
        "grace_period",
        SHUTDOWN,
        "How long to keep serving after leaving discovery, for routers that have not noticed yet.",
        "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS",
        default_text="5 with --drain complete, otherwise 0",
        metavar="SECONDS",
        number=SECONDS,
    ),
    Option(
        "engine_shutdown_timeout",
        SHUTDOWN,
        "Time limit for each plugin's cleanup hook.",
        "ENGINE_SHUTDOWN_TIMEOUT",
        default=30.0,
        metavar="SECONDS",
        number=_POSITIVE_SECONDS,
    ),
    Option(
        "termination_message_path",
        SHUTDOWN,
        "Existing file to which the cause is written, in one line, when the worker ends.",
        "DYN_WORKER_TERMINATION_MESSAGE_PATH",
        default=Path("/dev/termination-log"),
        metavar="FILE",
    ),
    Option(
        "health_check_interval",
        HEALTH,
        "Interval between health checks of the engine.",
        "DYN_ENGINE_HEALTH_CHECK_INTERVAL",
        default=2.0,
        metavar="SECONDS",
        number=_POSITIVE_SECONDS,
    ),
    Option(
        "health_check_timeout",
        HEALTH,
        "Time limit for one health check.",
        "DYN_ENGINE_HEALTH_CHECK_TIMEOUT",
        default=30.0,
        metavar="SECONDS",
        number=_POSITIVE_SECONDS,
    ),
    Option(
        "stall_timeout",
        HEALTH,
        "End the worker if the engine hangs for this long: no progress and no answer to a canary request (0: never).",
        "DYN_WORKER_STALL_TIMEOUT",
        default=30.0,
        metavar="SECONDS",
        number=_PATIENCE,
    ),
    Option(
        "stall_timeout_busy",
        HEALTH,
        "Allow an engine this much time without progress and answers while its processes work, as when it compiles "
        "kernels (0: any time).",
        "DYN_WORKER_STALL_TIMEOUT_BUSY",
        default=300.0,
        metavar="SECONDS",
        number=_PATIENCE,
    ),
    Option(
        "heartbeat_timeout",
        HEALTH,
        "Kill the worker if its event loop is blocked for this long while serving (0: never).",
        "DYN_WORKER_HEARTBEAT_TIMEOUT",
        default=25.0,
        metavar="SECONDS",
        number=_PATIENCE,
    ),
    Option(
        "slow_client_timeout",
        HEALTH,
        "Cancel a request if its client reads nothing for this long while megabytes are buffered for it (0: never).",
        "DYN_WORKER_SLOW_CLIENT_TIMEOUT",
        default=60.0,
        metavar="SECONDS",
        number=_PATIENCE,
    ),
    Option(
        "system_host",
        HEALTH,
        "Address of the status server (/health, /live and /metrics).",
        "DYN_SYSTEM_HOST",
        default_text="127.0.0.1 with a --frontend on loopback (not in Kubernetes), otherwise 0.0.0.0",
        metavar="HOST",
    ),
    Option(
        "system_port",
        HEALTH,
        "Port of the status server (-1: no server, 0: any free port).",
        "DYN_SYSTEM_PORT",
        default=-1,
        metavar="PORT",
        number=Number(-1, 65535),
    ),
    Option(
        "control_token_file",
        CONTROL,
        "File with the token that every request to a control route must carry; `DYN_WORKER_CONTROL_TOKEN` can hold the "
        "token itself.",
        "DYN_WORKER_CONTROL_TOKEN_FILE",
        metavar="FILE",
    ),
    Option(
        "control_load_root",
        CONTROL,
        "Directory, or URI such as `s3://bucket/adapters`, from which control routes may load LoRA adapters and "
        "weights; without one, loading is disabled (repeatable).",
        "DYN_WORKER_CONTROL_LOAD_ROOT",
        default=(),
        default_text="none",
        metavar="DIR",
        kind="list",
    ),
    Option(
        "control_write_root",
        CONTROL,
        "Directory in which control routes may write files, such as profiles; without one, writing is disabled "
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
        f"Run an OpenAI HTTP frontend beside the worker; without a value, on {DEFAULT_FRONTEND}.",
        "DYN_WORKER_FRONTEND",
        default_text="no frontend",
        metavar="[HOST:PORT]",
        bare=DEFAULT_FRONTEND,
    ),
    Option(
        "migration_limit",
        FRONTEND,
        "How many times the frontend may migrate one request to another worker.",
        "DYN_MIGRATION_LIMIT",
        default=3,
        metavar="N",
        number=Number(0, 2**32 - 1),  # the range of the runtime's own type
    ),
    Option(
        "router_mode",
        FRONTEND,
        "How the frontend picks a worker. Without `--frontend`, the model card asks all frontends to do so.",
        "DYN_ROUTER_MODE",
        default="round-robin",
        choices=get_args(RouterMode),
    ),
    *MODEL_OPTIONS,
    Option(
        "plugin",
        PLUGINS,
        "Load a plugin from a plain module; the current directory is searched first (repeatable).",
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
        "Installed plugins to load: `all`, `none`, or names separated by commas. Others are not imported; the engine "
        "always is.",
        "DYN_WORKER_INSTALLED_PLUGINS",
        default=("all",),
        default_text="all",
        metavar="LIST",
    ),
    Option(
        "no_plugin",
        PLUGINS,
        "Do not load this installed plugin (repeatable).",
        "DYN_WORKER_NO_PLUGIN",
        default=(),
        default_text="none",
        metavar="NAME",
        kind="list",
    ),
    *LOGGING_OPTIONS,
)

BY_NAME: Final = {option.name: option for option in OPTIONS}

#: All options of ``dynamo-worker frontend``. It has no worker beside it from which a default could follow.
FRONTEND_OPTIONS: Final = (
    Option("http", FRONTEND, "Address to listen on.", default=DEFAULT_FRONTEND, metavar="HOST:PORT"),
    replace(BY_NAME["discovery_backend"], default="file", default_text=None),
    replace(BY_NAME["discovery_path"], default_text="Dynamo's own"),
    BY_NAME["discovery_timeout"],
    BY_NAME["discovery_outage"],
    BY_NAME["request_plane"],
    BY_NAME["event_plane"],
    BY_NAME["migration_limit"],
    BY_NAME["router_mode"],
    BY_NAME["log_level"],
    BY_NAME["log_format"],
)


def markdown_table() -> str:
    """Return the documentation of all settings in Markdown, with one table per group."""
    lines = []
    for group in GROUPS:
        lines += [
            f"## {group}",
            "",
            "| flag | environment variable | YAML key | default | meaning |",
            "|---|---|---|---|---|",
        ]
        for row in (*OPTIONS, *RUNTIME_OPTIONS):
            if row.group == group:
                key = "" if row in RUNTIME_OPTIONS else f"`{row.name}`"
                flags = ", ".join(f"`{flag}`" for flag in row.flags)
                placeholder = f" `{row.placeholder}`".replace("|", "\\|") if row.placeholder else ""
                lines.append(f"| {flags}{placeholder} | `{row.env}` | {key} | {row.shown_default} | {row.help} |")
        lines.append("")
    return "\n".join(lines)
