"""The crash report for a bug in dynamo-worker."""

from __future__ import annotations

import platform
import sys
import traceback

from dynamo_worker import __version__
from dynamo_worker.errors import shortage


def print_crash(error: BaseException) -> None:
    """Print the traceback, the versions and the installed plugins to stderr."""
    from importlib.metadata import PackageNotFoundError, version

    traceback.print_exception(type(error), error, error.__traceback__)
    try:
        runtime = version("ai-dynamo-runtime")
    except PackageNotFoundError:
        runtime = "not installed"
    print(
        f"\ndynamo-worker: this is a bug ({type(error).__name__}); please report it with the lines above and these:\n"
        f"  dynamo-worker {__version__}, ai-dynamo-runtime {runtime}, "
        f"Python {platform.python_version()}, {platform.platform()}\n"
        f"  plugins: {_installed()}",
        file=sys.stderr,
    )


def _installed() -> str:
    try:
        from dynamo_worker.host.plugins.installed_plugins import describe_records, discover

        return describe_records(discover())
    except Exception as error:  # the crash report must not crash
        return f"cannot be listed: {error}"


def explained(error: BaseException) -> BaseException:
    """Return an error that says what to do if this one only reports a shortage, otherwise the error itself."""
    explained = shortage(error)
    if explained is None:
        return error
    explained.__cause__ = error
    return explained
