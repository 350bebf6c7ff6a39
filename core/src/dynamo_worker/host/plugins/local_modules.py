"""Modules in the current directory: found one by one, without the directory on ``sys.path``.

Other files in it, such as a ``uvloop.py``, must not be imported by accident.
"""

from __future__ import annotations

import contextlib
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import packages_distributions
from typing import TYPE_CHECKING

from dynamo_worker.host.plugins.installed_plugins import ENGINE_GROUP, PLUGIN_GROUP, find, module_exists

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Local:
    """Finds one module in the current directory, and nothing else in it.

    :param spec: the module, or the package that contains it.
    """

    def __init__(self, spec: ModuleSpec) -> None:
        self._spec = spec

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> ModuleSpec | None:
        """Return the spec of the module, None for any other."""
        return self._spec if name == self._spec.name else None


def local_spec(name: str) -> ModuleSpec | None:
    """Return the spec of the top-level module of this name in the current directory, or None."""
    top = name.partition(".")[0]
    try:
        spec = PathFinder.find_spec(top, [os.getcwd()])
    except FileNotFoundError:  # the directory is gone
        return None
    if spec is not None and spec.loader is None and module_exists(top):  # a bare directory must not hide a package
        return None
    return spec


def library_of(name: str) -> str | None:
    """Return which library has the top-level module of this name, such as ``the library transformers``.

    :return: None for a local module, for none at all, and for that of a package that offers plugins.
    """
    top = name.partition(".")[0]
    if local_spec(name) is not None or not module_exists(top):
        return None
    if top in sys.stdlib_module_names:
        return "Python's standard library"
    distributions = packages_distributions().get(top, ())
    offering = {entry.dist.name for group in (ENGINE_GROUP, PLUGIN_GROUP) for entry in find(group) if entry.dist}
    if not distributions or not offering.isdisjoint(distributions):
        return None
    return f"the library {distributions[0]}"


@contextlib.contextmanager
def importable(name: str) -> Iterator[None]:
    """Make a module of the current directory importable in the block; without such a module, change nothing."""
    spec = local_spec(name)
    if spec is None:
        yield
        return
    finder = _Local(spec)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
