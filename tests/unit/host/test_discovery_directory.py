"""The discovery directory is private, or refused."""

from __future__ import annotations

import errno
import os
from unittest.mock import Mock

import pytest

from dynamo_worker.errors import UsageError
from dynamo_worker.host.discovery.discovery_directory import writable_directory

pytestmark = pytest.mark.usefixtures("environment")


def test_the_discovery_directory_is_created(tmp_path):
    directory = tmp_path / "a" / "b"
    assert writable_directory(directory) == directory
    assert directory.stat().st_mode & 0o7777 == 0o700


@pytest.mark.parametrize("mask", [0, 0o002, 0o022, 0o077])
def test_whatever_the_umask_all_of_it_is_private(tmp_path, mask):
    """002 is usual where every user has a group of its own; the directory above would then be refused."""
    before = os.umask(mask)
    try:
        assert writable_directory(tmp_path / "a" / "b" / "c") == tmp_path / "a" / "b" / "c"
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o7777 == (tmp_path / "a" / "b").stat().st_mode & 0o7777 == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o2775, 0o770, 0o755])
def test_a_directory_of_ours_is_closed_to_others(tmp_path, mode, caplog):
    """What the runtime makes in it has the mode that the umask says: the group may write there on many clusters."""
    directory = tmp_path / "kv"
    (directory / "v1" / "instances").mkdir(parents=True)
    (directory / "v1").chmod(0o775)
    directory.chmod(mode)
    assert writable_directory(directory) == directory
    assert directory.stat().st_mode & 0o7777 == mode & 0o7700 | 0o700
    (record,) = caplog.records
    assert record.message == "Discovery directory closed to other users"
    assert writable_directory(directory) == directory
    assert len(caplog.records) == 1


def test_what_is_in_a_directory_that_only_we_write_in_is_ours(tmp_path):
    (tmp_path / "bin").mkdir()
    tmp_path.chmod(0o755)
    assert writable_directory(tmp_path) == tmp_path
    assert tmp_path.stat().st_mode & 0o7777 == 0o755


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775])
def test_a_directory_that_is_not_for_discovery_alone_is_not_closed(tmp_path, mode):
    """Such as /tmp or / for root."""
    (tmp_path / "bin").mkdir()
    tmp_path.chmod(mode)
    with pytest.raises(
        UsageError,
        match=rf"the discovery directory {tmp_path} is open to other users \(mode {mode:04o}\), .* has other contents",
    ) as raised:
        writable_directory(tmp_path)
    assert "--discovery-path" in raised.value.hint
    assert tmp_path.stat().st_mode & 0o7777 == mode


def test_a_directory_with_the_sticky_bit_is_not_closed(tmp_path):
    """It is meant for several users, such as the /tmp of a container, empty as it may be."""
    tmp_path.chmod(0o1777)
    with pytest.raises(UsageError, match=r"is open to other users \(mode 1777\)"):
        writable_directory(tmp_path)
    assert tmp_path.stat().st_mode & 0o7777 == 0o1777


@pytest.mark.parametrize("mode", [0o777, 0o755])
@pytest.mark.parametrize("error", [None, PermissionError(errno.EPERM, "Operation not permitted")])
def test_a_file_system_that_has_modes_of_its_own(tmp_path, monkeypatch, caplog, mode, error):
    """Such as CIFS: all that is made there has the mode that the mount says, and keeps it."""
    tmp_path.chmod(mode)
    monkeypatch.setattr(os, "chmod", Mock(side_effect=error))
    if mode == 0o755:
        assert writable_directory(tmp_path) == tmp_path
    else:
        with pytest.raises(
            UsageError, match=r"is open to other users \(mode 0777\), .* does not allow a stricter mode"
        ) as raised:
            writable_directory(tmp_path)
        assert "--discovery-path" in raised.value.hint
    assert not caplog.records


def test_a_link_on_the_way_may_lead_elsewhere_later(tmp_path):
    for name in ("work", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "work")
    directory = writable_directory(tmp_path / "link" / "kv")
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "other")
    assert directory == tmp_path / "work" / "kv"
    assert directory.is_dir()


def test_nothing_is_made_in_a_directory_of_another_user(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can make one")
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, 12345, 12345)
    with pytest.raises(UsageError, match=rf"is not safe, .*: {home} belongs to another user \(12345\)") as raised:
        writable_directory(home / "a" / "kv")
    assert raised.value.hint == "set --discovery-path to a directory of your own"
    assert not list(home.iterdir())


@pytest.mark.parametrize("what", ["directory", "link"])
def test_a_directory_of_another_user_is_refused(tmp_path, what):
    if os.geteuid() != 0:
        pytest.skip("only root can make one")
    ours, path = tmp_path / "ours", tmp_path / "kv"
    ours.mkdir()
    path.mkdir() if what == "directory" else path.symlink_to(ours)
    os.chown(path, 12345, 12345, follow_symlinks=False)
    with pytest.raises(UsageError, match=r"belongs to another user \(12345\)") as raised:
        writable_directory(path)
    assert "--discovery-path" in raised.value.hint


def test_a_directory_below_one_that_others_may_write_is_refused(tmp_path):
    """Who may rename it can put another one in its place."""
    above = tmp_path / "above"
    above.mkdir()
    above.chmod(0o777)
    (above / "kv").mkdir(0o700)
    for path in (above / "kv", above / "fresh"):
        with pytest.raises(
            UsageError, match=rf"is not safe, .*: others may write in {above}, which has no sticky bit"
        ) as raised:
            writable_directory(path)
        assert raised.value.hint == f"chmod go-w {above}, or +t; or set --discovery-path to a directory of your own"
    assert not (above / "fresh").exists()
    above.chmod(0o1777)
    assert writable_directory(above / "kv") == above / "kv"


def test_without_a_setting_the_directory_is_dynamos(tmp_path, monkeypatch):
    monkeypatch.setenv("DYN_FILE_KV", str(tmp_path / "kv"))
    assert writable_directory(None) == tmp_path / "kv"


def test_a_file_in_the_way_says_so(tmp_path):
    path = tmp_path / "file"
    path.touch()
    for directory in (path, path / "below"):
        with pytest.raises(UsageError, match="cannot be created") as raised:
            writable_directory(directory)
        assert str(directory) in str(raised.value)
        assert "--discovery-path" in raised.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_of_somebody_else_says_so(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="is not writable"):
        writable_directory(tmp_path)


def test_a_directory_that_cannot_be_written_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UsageError, match="is not writable"):
        writable_directory(tmp_path)
