"""The modules that plugins may import, and the new places of names that moved between releases."""

from __future__ import annotations

import re
from types import ModuleType
from typing import TYPE_CHECKING, Final

from dynamo_worker import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

PACKAGE: Final = "dynamo_worker"
#: The modules and packages that plugins may import, beside the names of ``dynamo_worker`` itself. ``API_VERSION``
#: covers their public names; everything else is private and changes without notice.
PUBLIC_MODULES: Final = (
    "deadline",
    "deprecation",
    "embeddings",
    "engine",
    "errors",
    "kit",
    "logs",
    "requests",
    "responses",
    "testing",
    "text",
)

#: The release that moved the names below.
_SINCE: Final = "0.2"
#: Public modules by the names they had before.
_MOVED: Final[Mapping[str, str]] = {
    "adapters": "kit.lora",
    "chunks": "kit.chunks",
    "disaggregation": "kit.disaggregation",
    "engine_arguments": "kit.engine_arguments",
    "engine_plugin": "kit.engine_plugin",
    "engine_processes": "kit.engine_processes",
    "headless": "kit.headless",
    "json_schema": "kit.json_schema",
    "operations": "kit.engine_control",
    "push_engine": "kit.push_engine",
    "rendezvous": "kit.rendezvous",
    "request_limits": "kit.request_limits",
    "routing": "kit.publishing",
    "standby": "kit.preload",
    "translation": "kit.translation",
}
#: Modules that plugins could reach before and that belong to the worker now.
_PRIVATE: Final = frozenset(
    {
        *("calling", "contract", "control", "control_routes", "discovery", "drain_progress", "egress", "engine_checks"),
        *("frontend", "http_message", "launcher", "listening", "metrics", "monitors", "native_output", "open_files"),
        *("options", "plugins", "registration", "runtime", "serving", "settings", "shutdown_plan", "status_server"),
    }
)
#: Readers of single fields, which were in ``translation``, and their names in ``kit.fields``.
_FIELD_READERS: Final[Mapping[str, str]] = {
    "allowed_tokens": "allowed_token_ids",
    "answers": "answer_count",
    "count": "logprob_count",
    "length": "token_count",
    "rank": "rank",
    "tokens": "token_ids",
    **{name: name for name in ("boolean", "integer", "logit_bias", "mapping", "number", "refusal")},
    **{name: name for name in ("Reader", "repetition_penalty", "section", "string", "unsupported")},
}
#: What replaces a name, by the module that had it: the old module and its new one share an entry.
_RENAMED: Final[Mapping[str, Mapping[str, str]]] = {
    "kit.engine_control": {
        "Operations": "EngineControl",
        "Presence": "DiscoveryGate (step_out, step_in and step_aside: withdraw, rejoin and withdrawn_for)",
        "Operation": f"{PACKAGE}.engine.Operation",
    },
    "kit.chunks": {"nothing": "no_tokens"},
    "kit.engine_arguments": {"kv_events_socket": "kv_events_config"},
    "kit.engine_plugin": {"HasLifecycle": f"{PACKAGE}.kit.engine_lifecycle.EngineLifecycle"},
    "kit.lora": {"Adapter": "LoraAdapter", "AdapterLoader": "LoraLoader", "Adapters": "LoraAdapters"},
    "kit.translation": {
        "GUIDED": f"{PACKAGE}.kit.guided_decoding.KEYS",
        "guided_decoding": f"{PACKAGE}.kit.guided_decoding.read",
        "canary": f"{PACKAGE}.kit.canary.canary_request",
        "adapter_name": f"{PACKAGE}.kit.request_metadata.lora_name",
        **{name: f"{PACKAGE}.kit.request_metadata.{name}" for name in ("cache_salt", "priority", "session_id")},
        **{name: f"{PACKAGE}.kit.fields.{new}" for name, new in _FIELD_READERS.items()},
    },
    "metrics": {"PrefixCollector": f"{PACKAGE}.kit.metrics.PrefixCollector"},
    "registration": {"changing": "EngineContext.discovery"},
    "serving": {"LocalContext": f"{PACKAGE}.engine.LocalContext", "pulled": f"{PACKAGE}.kit.push_engine.pulled"},
}

_CANNOT_IMPORT: Final = re.compile(r"cannot import name '(?P<name>\w+)' from '(?P<module>[\w.]+)'")


def what_moved(error: BaseException) -> str | None:
    """Explain an import that failed because this package does not have the name; None for other errors.

    The text completes "engine 'x' from x-dist 1.0 ...".

    :param error: raised by the import, or by the use of an attribute of an imported module.
    """
    if isinstance(error, ModuleNotFoundError):
        return _missing_module(error.name or "")
    if isinstance(error, ImportError):
        match = _CANNOT_IMPORT.match(str(error))
        return None if match is None else _missing_name(match["module"], match["name"])
    if isinstance(error, AttributeError) and isinstance(error.obj, ModuleType):
        return _missing_name(error.obj.__name__, error.name or "")
    return None


def _missing_module(module: str) -> str | None:
    package, _, name = module.partition(".")
    if package != PACKAGE or not name:
        return None
    imports = f"imports {module!r}, which"
    renamed = _RENAMED.get(_MOVED.get(name, name), {})
    names = "".join(f"; {old} is now {new}" for old, new in renamed.items())
    if name in _MOVED:
        return f"{imports} is '{PACKAGE}.{_MOVED[name]}' since {_SINCE}{names}"
    if name in _PRIVATE:
        return f"{imports} is private to the worker since {_SINCE}{names}"
    return f"{imports} dynamo-worker {__version__} does not have"


def _missing_name(module: str, name: str) -> str | None:
    package, _, inner = module.partition(".")
    if package != PACKAGE:
        return None
    if not inner and (name in _MOVED or name in _PRIVATE):
        return _missing_module(f"{PACKAGE}.{name}")
    imports = f"imports {name!r} from {module!r}, which"
    replacement = _RENAMED.get(inner, {}).get(name)
    if replacement is not None:
        return f"{imports} is {replacement} since {_SINCE}"
    return f"{imports} dynamo-worker {__version__} does not have"
