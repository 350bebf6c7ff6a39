"""Finding an engine class and making an engine of it, with a clear error for each way in which that can fail."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from dynamo_worker import StartError, UsageError
from dynamo_worker.errors import WorkerError, describe
from dynamo_worker.logs import get_logger
from dynamo_worker_dynamo.side_effects import FlagsError, no_exit_of_argparse, undone

if TYPE_CHECKING:
    from collections.abc import Sequence

log = get_logger(__name__)

#: The version of ``ai-dynamo`` that the tests run with.
TESTED: Final = "1.6.1"
INSTALL: Final = "pip install 'dynamo-worker-dynamo[cuda]'"
_PROTOCOL: Final = "dynamo.common.backend"


class Made(NamedTuple):
    """What ``from_args`` of a class returns.

    :param engine: the ``LLMEngine``.
    :param config: its ``WorkerConfig``.
    """

    engine: Any
    config: Any


async def make(path: str, arguments: Sequence[str]) -> Made:
    """Import a class and make an engine of it, which is not started.

    :param path: ``module:Class``.
    :param arguments: the class's own flags.
    :raises StartError: a package is missing or does not fit, the class does not exist or is no ``LLMEngine``, or its
        ``from_args`` fails.
    :raises UsageError: the class refuses its flags.
    """
    check_versions()
    with undone():
        kind = _find(path)
        return await _from_args(kind, path, arguments)


def check_versions() -> None:
    """Check the installed ``ai-dynamo``, whose classes rely on the runtime of the very same version.

    :raises StartError: it is missing, or does not fit the runtime.
    """
    try:
        found = importlib.metadata.version("ai-dynamo")
    except importlib.metadata.PackageNotFoundError as error:
        raise StartError(
            "the dynamo engine needs the Python package 'ai-dynamo', which is not installed", hint=INSTALL
        ) from error
    runtime = importlib.metadata.version("ai-dynamo-runtime")
    if found != runtime:
        raise StartError(
            f"ai-dynamo {found} does not fit ai-dynamo-runtime {runtime}: its engine classes need the runtime of their "
            "own version",
            hint=f"pip install ai-dynamo=={runtime}",
        )
    if found != TESTED:
        log.warning("This version of ai-dynamo is not tested with engine classes", found=found, tested=TESTED)


def _find(path: str) -> Any:
    """Return the class.

    :raises StartError: there is no such class, its module cannot be imported, or it is no ``LLMEngine``.
    """
    name, _, attribute = path.partition(":")
    module = _import(name, path)
    from dynamo.common.backend import BaseEngine, LLMEngine, RawEngine

    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if found is None:
        others = [key for key, value in vars(module).items() if _is_engine(value, LLMEngine) and value is not LLMEngine]
        known = f"; it has {', '.join(sorted(others))}" if others else ""
        raise StartError(f"--engine-class {path}: the module {name} has no {attribute}{known}")
    if not inspect.isclass(found):
        raise StartError(f"--engine-class {path}: expected a class, got {type(found).__name__}")
    if issubclass(found, RawEngine):
        raise StartError(f"--engine-class {path}: it generates media; a worker serves classes that generate tokens")
    if not issubclass(found, LLMEngine):
        wrong = "only a BaseEngine" if issubclass(found, BaseEngine) else "not an LLMEngine"
        raise StartError(f"--engine-class {path}: the class is {wrong} ({_PROTOCOL}.LLMEngine)")
    lacking = sorted(getattr(found, "__abstractmethods__", ()))
    if lacking:
        raise StartError(f"--engine-class {path}: the class does not implement {', '.join(lacking)}")
    return found


def _is_engine(value: object, kind: type) -> bool:
    return inspect.isclass(value) and issubclass(value, kind)


def _import(name: str, path: str) -> Any:
    try:
        importlib.import_module(_PROTOCOL)
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(f"{missing}."):
            raise StartError(
                f"--engine-class {path}: there is no module {missing!r}",
                hint="install its package, or name its folder in PYTHONPATH",
            ) from error
        raise StartError(
            f"--engine-class {path} needs the Python package {missing!r}, which is not installed",
            hint=f"install it, or what the class's own documentation names; for {_PROTOCOL}: {INSTALL}",
        ) from error
    except (Exception, SystemExit) as error:
        raise StartError(
            f"--engine-class {path}: the module cannot be imported: {describe(error)}",
            hint=f"run `python -c 'import {name}'` for the full traceback",
        ) from error


async def _from_args(kind: Any, path: str, arguments: Sequence[str]) -> Made:
    try:
        with no_exit_of_argparse():
            made = await kind.from_args(list(arguments))
    except FlagsError as error:
        raise UsageError(
            f"--engine-class {path}: {error}", hint=f"`--engine-class {path} -- --help` at the end shows its flags"
        ) from error
    except SystemExit as error:
        if not error.code:
            raise StartError(f"--engine-class {path}: the class has ended its own start, as for --help") from error
        raise UsageError(f"--engine-class {path}: the class refuses its flags ({error.code!s:.200})") from error
    except WorkerError:
        raise
    except ModuleNotFoundError as error:
        raise StartError(
            f"--engine-class {path} needs the Python package {error.name!r}, which is not installed"
        ) from error
    except Exception as error:
        log.error("from_args of the engine class failed", exc_info=error)
        raise StartError(f"--engine-class {path}: from_args failed: {describe(error)}") from error
    from dynamo.common.backend import LLMEngine, WorkerConfig

    right = isinstance(made, tuple) and len(made) == len(Made._fields)
    if not right or not isinstance(made[0], LLMEngine) or not isinstance(made[1], WorkerConfig):
        raise StartError(
            f"--engine-class {path}: from_args must return an LLMEngine and a WorkerConfig, got {made!r:.200}"
        )
    return Made(*made)
