"""The files of ``file://`` URLs, which a worker refuses unless the operator allows a directory."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from dynamo_worker.allowed_paths import AllowedPaths
from dynamo_worker.errors import InvalidRequestError
from dynamo_worker.kit.media_http import too_large
from dynamo_worker.kit.media_urls import MediaError

if TYPE_CHECKING:
    from dynamo_worker.kit.media_settings import MediaSettings


def read(url: str, settings: MediaSettings) -> bytes:
    """Return the content of a file. Blocks, on a network file system perhaps for long.

    :raises MediaError: the file is not allowed, is none, or is too large.
    """
    try:
        path = AllowedPaths(media=settings.paths).to_fetch(url)
    except InvalidRequestError as error:
        raise MediaError(str(error)) from None
    try:
        # Without O_NONBLOCK a pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            # The path was resolved before: nobody may have put a link in its place since.
            if os.readlink(f"/proc/self/fd/{descriptor}") != path:
                raise MediaError("the file has changed its place while it was opened")
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise MediaError("it is no regular file")
            content = file.read(settings.max_bytes + 1)
    except OSError as error:
        raise MediaError(f"the file cannot be read: {error.strerror or 'it is not valid'}") from None
    if len(content) > settings.max_bytes:
        raise too_large(settings)
    return content
