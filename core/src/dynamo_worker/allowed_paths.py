"""The paths that requests may name: only below the operator's directories."""

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
    """The directories and URIs below which requests may load and write; empty means not at all.

    Resolving a path can take long on a network file system: call these methods in a thread.

    :param load: directories, and URIs such as ``s3://bucket/adapters``.
    :param write: directories.
    :param media: directories in which images are.
    """

    load: Sequence[str] = ()
    write: Sequence[str] = ()
    media: Sequence[str] = ()

    def to_load(self, wanted: str) -> str:
        """Return the resolved path, or the URI, from which a request may load.

        :raises InvalidRequestError: loading from there is not allowed.
        """
        return _below(self.load, wanted, "load", "--control-load-root")

    def to_write(self, wanted: str) -> str:
        """Return the resolved path to which a request may write.

        :raises InvalidRequestError: writing there is not allowed.
        """
        return _below(self.write, wanted, "write", "--control-write-root")

    def to_fetch(self, wanted: str) -> str:
        """Return the resolved path of an image that a request names.

        :raises InvalidRequestError: fetching from there is not allowed.
        """
        return _below(self.media, wanted, "fetch from", "--media-allow-path")

    @staticmethod
    def name(wanted: object) -> str:
        """Return a name that becomes part of a file name.

        :raises InvalidRequestError: it is not a string, or contains a directory.
        """
        if not isinstance(wanted, str) or "/" in wanted or "\0" in wanted or wanted in (".", ".."):
            raise InvalidRequestError(f"expected a name without directories, got {wanted!r:.80}")
        return wanted


def check_load_roots(roots: tuple[str, ...]) -> tuple[str, ...]:
    """Return the roots if each is an absolute path or a URI.

    :raises ValueError: one of them is neither.
    """
    for root in roots:
        if not os.path.isabs(root) and not _is_remote(root):
            raise ValueError(f"expected an absolute path, or a URI such as s3://bucket/adapters, got {root!r}")
    return roots


def check_write_roots(roots: tuple[str, ...]) -> tuple[str, ...]:
    """Return the roots if each is an absolute path.

    :raises ValueError: one of them is not.
    """
    for root in roots:
        if not os.path.isabs(root):
            raise ValueError(f"expected an absolute path, got {root!r}")
    return roots


def _is_remote(uri: str) -> bool:
    parts = urlsplit(uri)
    return parts.scheme not in ("", "file") and bool(parts.netloc)


def _below(roots: Sequence[str], wanted: str, what: str, flag: str) -> str:
    if not roots:
        raise InvalidRequestError(f"this worker does not {what} paths given in requests; {flag} DIR allows a directory")
    try:
        found = _found_below(roots, wanted)
    except ValueError as error:  # a null byte, a lone surrogate, an invalid host
        raise InvalidRequestError(f"{wanted!r:.200} is not a valid path or URI: {error}") from error
    if found is None:
        raise InvalidRequestError(f"{wanted!r:.200} is not below a directory allowed by {flag}")
    return found


def _found_below(roots: Sequence[str], wanted: str) -> str | None:
    if _is_remote(wanted):
        return wanted if any(_is_remote(root) and _uri_is_below(root, wanted) for root in roots) else None
    # The target of a link is checked, and the caller uses that same target.
    path = os.path.realpath(unquote(urlsplit(wanted).path) if wanted.startswith("file:") else wanted)
    return path if any(_path_is_below(os.path.realpath(root), path) for root in roots if not _is_remote(root)) else None


def _path_is_below(root: str, path: str) -> bool:
    return os.path.commonpath((root, path)) == root


def _uri_is_below(root: str, wanted: str) -> bool:
    """Return whether one URI is below another, however a server or a cache normalizes it."""
    base, parts = urlsplit(root), urlsplit(wanted)
    segments = unquote(parts.path).split("/")
    return (
        (parts.scheme, parts.netloc) == (base.scheme, base.netloc)
        and not {".", ".."}.intersection(segments)
        and "\\" not in wanted
        and (parts.path + "/").startswith(base.path.rstrip("/") + "/")
    )
