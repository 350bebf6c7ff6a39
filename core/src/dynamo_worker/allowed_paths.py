"""What operations may load and write: only below the directories that the operator has named."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from dynamo_worker.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class AllowedPaths:
    """The roots of what operations may load and write; without any they may do neither.

    Looking up a path may take long on a network file system: call these methods in a thread.

    :param load: directories, and URIs such as ``s3://bucket/adapters``.
    :param write: directories.
    """

    load: Sequence[str] = ()
    write: Sequence[str] = ()

    def to_load(self, wanted: str) -> str:
        """Return the path, without links, or the URI from which a request may load.

        :raises InvalidRequestError: it may not.
        """
        return _below(self.load, wanted, "load", "--control-load-root")

    def to_write(self, wanted: str) -> str:
        """Return the path, without links, to which a request may write.

        :raises InvalidRequestError: it may not.
        """
        return _below(self.write, wanted, "write", "--control-write-root")

    @staticmethod
    def name(wanted: object) -> str:
        """Return what becomes part of a file's name.

        :raises InvalidRequestError: it is none, or leads to another directory.
        """
        if not isinstance(wanted, str) or "/" in wanted or "\0" in wanted or wanted in (".", ".."):
            raise InvalidRequestError(f"{wanted!r:.80} must be a name, without directories")
        return wanted


def check_load_roots(roots: tuple[str, ...]) -> tuple[str, ...]:
    """Return the roots if each is an absolute path or a URI.

    :raises ValueError: one is not.
    """
    for root in roots:
        if not os.path.isabs(root) and not _is_remote(root):
            raise ValueError(f"{root!r} must be an absolute path, or a URI such as s3://bucket/adapters")
    return roots


def check_write_roots(roots: tuple[str, ...]) -> tuple[str, ...]:
    """Return the roots if each is an absolute path.

    :raises ValueError: one is not.
    """
    for root in roots:
        if not os.path.isabs(root):
            raise ValueError(f"{root!r} must be an absolute path")
    return roots


def _is_remote(uri: str) -> bool:
    parts = urlsplit(uri)
    return parts.scheme not in ("", "file") and bool(parts.netloc)


def _below(roots: Sequence[str], wanted: str, what: str, flag: str) -> str:
    if not roots:
        raise InvalidRequestError(
            f"this worker may not {what} what requests name; {flag} DIR allows it for a directory"
        )
    try:
        found = _found_below(roots, wanted)
    except ValueError as error:  # a zero byte, half a surrogate, an address that is none
        raise InvalidRequestError(f"{wanted!r:.200} is no path or URI: {error}") from error
    if found is None:
        raise InvalidRequestError(f"{wanted!r:.200} is not below a directory from {flag}")
    return found


def _found_below(roots: Sequence[str], wanted: str) -> str | None:
    if _is_remote(wanted):
        return wanted if any(_is_remote(root) and _uri_is_below(root, wanted) for root in roots) else None
    # What a link leads to counts, and it is what the caller goes on with.
    path = os.path.realpath(unquote(urlsplit(wanted).path) if wanted.startswith("file:") else wanted)
    return path if any(_path_is_below(os.path.realpath(root), path) for root in roots if not _is_remote(root)) else None


def _path_is_below(root: str, path: str) -> bool:
    return os.path.commonpath((root, path)) == root


def _uri_is_below(root: str, wanted: str) -> bool:
    """Return whether one URI is below another, whatever a server or a cache makes of unusual ones."""
    base, parts = urlsplit(root), urlsplit(wanted)
    segments = unquote(parts.path).split("/")
    return (
        (parts.scheme, parts.netloc) == (base.scheme, base.netloc)
        and not {".", ".."}.intersection(segments)
        and "\\" not in wanted
        and (parts.path + "/").startswith(base.path.rstrip("/") + "/")
    )
