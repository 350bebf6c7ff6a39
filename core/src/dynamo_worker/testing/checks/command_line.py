"""Checks of a plugin before any engine exists: its import, its flags and its hooks."""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from dynamo_worker.hookspecs import API_VERSION
from dynamo_worker.host.plugins.flags import colliding
from dynamo_worker.host.plugins.installed_plugins import ENGINE_GROUP, find, reference
from dynamo_worker.supervisor import interpreter
from dynamo_worker.testing.resource_snapshot import descendants
from dynamo_worker.testing.trial import load_plugins

if TYPE_CHECKING:
    from dynamo_worker.testing.subject import Subject
    from dynamo_worker.testing.trial import Trial

#: Libraries that take seconds to import and that engines are built on.
_HEAVY = ("torch", "tensorflow", "jax", "transformers", "vllm", "sglang", "tensorrt_llm", "onnxruntime", "llama_cpp")
#: Longest import in seconds.
_IMPORT_SECONDS = 120
#: Prints, as its last line, what is imported once a module is, and how many seconds of CPU time that took.
_PROGRAM = """
import importlib, json, sys, time
started = time.process_time()
module = importlib.import_module(sys.argv[1])
for name in filter(None, sys.argv[2].split(".")):
    module = getattr(module, name)
print(json.dumps([sorted(sys.modules), time.process_time() - started, getattr(module, "engine", None)]))
"""


@functools.cache
def _import(engine: str) -> tuple[str, str]:
    """Import an engine's plugin in another process; return what that printed, and why it failed."""
    entries = [entry for entry in find(ENGINE_GROUP) if entry.name == engine]
    module, attributes = reference(entries[0]) if entries else (engine, [])
    program = f"import sys; sys.path[:] = {sys.path!r}\n{_PROGRAM}"
    result = subprocess.run(
        [sys.executable, *interpreter.code_arguments(program), str(module), ".".join(attributes)],
        capture_output=True,
        text=True,
        timeout=_IMPORT_SECONDS,
        check=False,
    )
    return result.stdout, "" if result.returncode == 0 else result.stderr[-300:]


def _imported(trial: Trial) -> tuple[set[str], float, object]:
    """Return the names of the imported modules, the CPU time in seconds, and what the plugin names as its engine."""
    output, error = _import(trial.subject.engine)
    trial.expect(not error, f"importing the plugin failed: {error}", f"engine {trial.subject.engine!r}")
    modules, seconds, engine = json.loads(output.splitlines()[-1])
    return set(modules), seconds, engine


def _parser(trial: Trial) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    trial.plugins.add_arguments(parser)
    return parser


def _hook(trial: Trial, name: str) -> object:
    return getattr(trial.plugins.engine_plugin, name, None)


class CommandLineChecks:
    """What ``dynamo-worker --help``, ``engines`` and ``check`` do with the plugin."""

    def test_importing_the_plugin_imports_no_engine(self, trial: Trial) -> None:
        """``--help`` and ``engines`` import the plugin: they take seconds, or fail where the engine is missing."""
        modules, _, engine = _imported(trial)
        own = {engine.partition(":")[0]} if isinstance(engine, str) else set()
        found = sorted(modules & {*_HEAVY, *own})
        trial.expect(not found, f"importing the plugin imports {', '.join(found)}", f"engine {trial.subject.engine!r}")

    def test_importing_the_plugin_is_quick(self, trial: Trial) -> None:
        """Every command of ``dynamo-worker`` waits for it."""
        seconds, limit = _imported(trial)[1], 1.0 * trial.subject.patience
        trial.expect(seconds < limit, f"the import took {seconds:.1f} s of CPU time; at most {limit}")

    def test_flags_do_not_collide_with_the_workers(self, trial: Trial) -> None:
        """The worker takes a flag that both define: the engine never sees what the operator wrote."""
        taken = colliding(_parser(trial), trial.plugins.engine_plugin)
        trial.expect(not taken, f"the worker takes {', '.join(taken)}", _hook(trial, "add_arguments"))

    def test_help_can_be_shown(self, trial: Trial) -> None:
        """A percent sign in the text of a flag makes ``--help`` fail with a traceback."""
        try:
            _parser(trial).format_help()
        except (ValueError, TypeError, KeyError) as error:
            hook = _hook(trial, "add_arguments")
            raise trial.finding(f"formatting the help raised {error!r}; write %% for %", hook) from error

    def test_flags_can_be_added_twice(self, trial: Trial) -> None:
        """Help, completion and the start each make a parser of their own."""
        first, second = (_parser(trial).format_usage() for _ in range(2))
        trial.expect(first == second, "the second parser has other flags", _hook(trial, "add_arguments"))

    def test_adding_flags_starts_nothing(self, trial: Trial) -> None:
        """``--help`` must not start a process."""
        before = descendants()
        _parser(trial)
        new = [command for pid, command in descendants().items() if pid not in before]
        trial.expect(not new, f"it started {new}", _hook(trial, "add_arguments"))

    def test_prepare_returns_at_once(self, trial: Trial) -> None:
        """The worker cannot report anything, not even a wrong flag, before ``prepare`` returns."""
        started = time.monotonic()
        trial.plugins.prepare([])
        seconds, limit = time.monotonic() - started, 0.3 * trial.subject.patience
        trial.expect(seconds < limit, f"it took {seconds:.1f} s; at most {limit}", _hook(trial, "prepare"))

    def test_create_engine_is_a_plain_function(self, subject: Subject) -> None:
        """A coroutine is no engine: the start fails."""
        plugin = load_plugins(subject.engine).engine_plugin
        hook = getattr(plugin, "create_engine", None)
        assert not inspect.iscoroutinefunction(hook), "create_engine is a coroutine function; make it a plain one"

    def test_the_plugin_declares_its_api_version(self, trial: Trial) -> None:
        """Without ``dynamo_worker_api`` an incompatible worker fails somewhere instead of saying what to upgrade."""
        declared = getattr(trial.plugins.engine_plugin, "dynamo_worker_api", None)
        trial.expect(declared, f"dynamo_worker_api is not set; this worker has {API_VERSION}")

    def test_every_method_of_the_protocol_is_there(self, trial: Trial) -> None:
        """The worker calls ``abort`` for every client that leaves, and ``processes`` to watch the engine."""
        methods = ("start", "generate", "abort", "processes")
        missing = [name for name in methods if not callable(getattr(trial.engine, name, None))]
        trial.expect(not missing, f"the engine has no {' or '.join(missing)}")
