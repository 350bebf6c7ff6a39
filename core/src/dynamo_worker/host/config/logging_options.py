"""The options for what a worker writes about itself: logs, its configuration, its flight record."""

from __future__ import annotations

from typing import Final, Literal, get_args

from dynamo_worker.host.config.option_types import LOGGING, Number, Option
from dynamo_worker.supervisor.recorder import DEFAULT_KEEP, MOST_KEPT

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]

LOGGING_OPTIONS: Final = (
    Option(
        "dump_config_to",
        LOGGING,
        "Write all settings and the engine's flags to this file before the engine starts, as YAML and without secrets.",
        "DYN_DUMP_CONFIG_TO",
        metavar="FILE",
    ),
    Option(
        "record_dir",
        LOGGING,
        "Directory for flight records, which `dynamo-worker explain` reads: one file for each worker, at most 192 KiB.",
        "DYN_WORKER_RECORD_DIR",
        default_text="`dynamo-worker/records` in `XDG_STATE_HOME` or `~/.local/state`",
        metavar="DIR",
    ),
    Option(
        "record_keep",
        LOGGING,
        "How many flight records to keep there (0: write none).",
        "DYN_WORKER_RECORD_KEEP",
        default=DEFAULT_KEEP,
        metavar="N",
        number=Number(0, MOST_KEPT),
    ),
    Option(
        "log_level",
        LOGGING,
        "Lowest severity to log.",
        "DYN_WORKER_LOG_LEVEL",
        default="info",
        choices=get_args(LogLevel),
        alias="--worker-log-level",
    ),
    Option(
        "log_format",
        LOGGING,
        "Plain text lines, or one JSON object per line.",
        "DYN_WORKER_LOG_FORMAT",
        default="text",
        choices=get_args(LogFormat),
    ),
)
