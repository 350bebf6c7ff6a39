"""Deprecations in the plugin API: marking deprecated parts, and reporting their use to the plugin's author.

docs/plugins.md states the policy: what a minor release deprecates keeps working until the next major API version.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class RemovedInApi2Warning(FutureWarning):
    """A plugin uses a part of the API that API 2.0 removes.

    A ``FutureWarning``, because Python hides ``DeprecationWarning`` outside of ``__main__``.
    """


def deprecated(what: str, *, since: str, use: str) -> RemovedInApi2Warning:
    """Return the warning for a deprecated part of the API.

    Pass it to ``hookspec(warn_on_impl=...)`` for a hook, to ``warn_on_impl_args`` for an argument of one, or to
    ``warnings.warn`` for a function.

    :param what: what is deprecated, such as ``the hook 'prepare'``.
    :param since: the API version that deprecated it.
    :param use: what replaces it.
    """
    return RemovedInApi2Warning(f"{what} is deprecated since API {since} and goes away in API 2.0: use {use}")


@contextlib.contextmanager
def collect_deprecations() -> Iterator[list[str]]:
    """Collect the deprecation warnings that are issued in the block; other warnings are shown as usual.

    Warning filters stay as they are: the block imports plugins, which may set their own.

    :return: one ``message (file:line)`` for each warning; the place is the plugin's.
    """
    found: list[str] = []
    show = warnings.showwarning

    def note(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: object) -> None:
        if issubclass(category, RemovedInApi2Warning):
            found.append(f"{message} ({filename}:{lineno})")
        else:
            show(message, category, filename, lineno, *rest)  # type: ignore[arg-type]

    warnings.showwarning = note  # type: ignore[assignment]
    try:
        yield found
    finally:
        warnings.showwarning = show
