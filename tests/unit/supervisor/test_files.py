"""Files that another user may have replaced are opened safely."""

from __future__ import annotations

import os
import socket
import time

import pytest

from dynamo_worker.supervisor.files import open_regular


def test_a_regular_file(tmp_path):
    (tmp_path / "file").write_text("content")
    descriptor = open_regular(tmp_path / "file", os.O_RDONLY)
    try:
        assert os.read(descriptor, 100) == b"content"
        assert not os.get_inheritable(descriptor)
    finally:
        os.close(descriptor)


def test_below_a_directory(tmp_path):
    (tmp_path / "file").write_text("content")
    directory = os.open(tmp_path, os.O_PATH)
    try:
        descriptor = open_regular("file", os.O_RDONLY, dir_fd=directory)
        assert os.read(descriptor, 100) == b"content"
        os.close(descriptor)
    finally:
        os.close(directory)


def plant(path, what):
    """Put something in the place of a file; return what has to be closed."""
    if what == "fifo":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    elif what == "socket":
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        return [listener]
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "terminal":
        path.symlink_to("/dev/tty")
    return []


@pytest.mark.parametrize("what", ["nothing", "fifo", "directory", "socket", "device", "terminal"])
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR], ids=["read", "write", "both"])
def test_anything_else_is_refused_at_once(tmp_path, what, flags):
    planted = plant(tmp_path / "file", what)
    descriptors, started = len(os.listdir("/proc/self/fd")), time.monotonic()
    with pytest.raises(OSError, match=r"."):
        open_regular(tmp_path / "file", flags)
    assert time.monotonic() - started < 5, "a FIFO without another end blocks"
    assert len(os.listdir("/proc/self/fd")) == descriptors
    for it in planted:
        it.close()


def test_a_link_is_followed_unless_it_is_refused(tmp_path):
    (tmp_path / "file").write_text("content")
    (tmp_path / "link").symlink_to("file")
    os.close(open_regular(tmp_path / "link", os.O_RDONLY))
    with pytest.raises(OSError, match="symbolic links"):
        open_regular(tmp_path / "link", os.O_RDONLY | os.O_NOFOLLOW)
