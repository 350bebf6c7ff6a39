"""Directories that other users can or cannot replace."""

from __future__ import annotations

import os
import stat

import pytest

from dynamo_worker.supervisor.safe_place import (
    PLACE,
    UnsafePlaceError,
    check_above,
    check_place,
    make_directory,
    make_safe,
    real_path,
)

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give directories away")


@pytest.fixture
def opened(tmp_path):
    """Returns a function that opens a directory below the test's own."""
    descriptors = []

    def open_directory(*names):
        descriptors.append(os.open(tmp_path.joinpath(*names), PLACE))
        return descriptors[-1]

    yield open_directory
    for descriptor in descriptors:
        os.close(descriptor)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


class TestCheckPlace:
    @pytest.mark.parametrize("bits", [0o700, 0o755, 0o1777, 0o1775])
    def test_safe(self, tmp_path, opened, bits):
        (tmp_path / "a").mkdir()
        (tmp_path / "a").chmod(bits)
        check_place(opened("a"))

    @pytest.mark.parametrize("bits", [0o777, 0o770, 0o702])
    @pytest.mark.parametrize("below", [(), ("b",), ("b", "c")], ids=len)
    def test_others_may_write_somewhere_above(self, tmp_path, opened, bits, below):
        tmp_path.joinpath("a", *below).mkdir(parents=True)
        (tmp_path / "a").chmod(bits)
        with pytest.raises(UnsafePlaceError) as error:
            check_place(opened("a", *below))
        assert error.value.advice == f"chmod go-w {tmp_path / 'a'}, or +t"
        assert str(tmp_path / "a") in error.value.words

    @root_only
    @pytest.mark.parametrize("below", [(), ("b",)], ids=len)
    def test_of_another_user(self, tmp_path, opened, below):
        tmp_path.joinpath("a", *below).mkdir(parents=True)
        os.chown(tmp_path / "a", 12345, 12345)
        with pytest.raises(UnsafePlaceError, match=r"a belongs to another user \(12345\)"):
            check_place(opened("a", *below))

    def test_descriptors(self, tmp_path, opened):
        directory = opened()
        before = len(os.listdir("/proc/self/fd"))
        check_place(directory)
        tmp_path.chmod(0o777)
        with pytest.raises(UnsafePlaceError):
            check_place(directory)
        assert len(os.listdir("/proc/self/fd")) == before


def test_check_above_leaves_out_the_directory_itself(tmp_path, opened):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b").chmod(0o777)
    check_above(opened("a", "b"))
    (tmp_path / "a").chmod(0o777)
    with pytest.raises(UnsafePlaceError):
        check_above(opened("a", "b"))


class TestMakeSafe:
    def test_the_sticky_bit_is_set_where_it_is_ours_to_set(self, tmp_path, opened):
        (tmp_path / "a").mkdir()
        (tmp_path / "a").chmod(0o777)
        assert make_safe("a", opened("a")) == ["a: others may write there; the sticky bit was set"]
        assert mode(tmp_path / "a") == 0o1777
        assert make_safe("a", opened("a")) == []

    def test_what_stays_unsafe_is_not_changed(self, tmp_path, opened):
        (tmp_path / "a" / "b").mkdir(parents=True)
        for path in (tmp_path / "a", tmp_path / "a" / "b"):
            path.chmod(0o777)
        with pytest.raises(UnsafePlaceError):
            make_safe("b", opened("a", "b"))
        assert mode(tmp_path / "a" / "b") == 0o777


class TestMakeDirectory:
    def test_what_is_missing_is_made_for_this_user_alone(self, tmp_path):
        previous = os.umask(0)
        try:
            os.close(make_directory(str(tmp_path / "a" / "b")))
        finally:
            os.umask(previous)
        assert mode(tmp_path / "a") == mode(tmp_path / "a" / "b") == 0o700

    def test_what_is_there_stays(self, tmp_path):
        (tmp_path / "a").mkdir()
        (tmp_path / "a").chmod(0o750)
        descriptor = make_directory(str(tmp_path / "a"))
        assert real_path(descriptor) == str(tmp_path / "a")
        os.close(descriptor)
        assert mode(tmp_path / "a") == 0o750

    def test_nothing_is_made_where_others_could_replace_it(self, tmp_path):
        (tmp_path / "a").mkdir()
        (tmp_path / "a").chmod(0o777)
        descriptors = len(os.listdir("/proc/self/fd"))
        with pytest.raises(UnsafePlaceError):
            make_directory(str(tmp_path / "a" / "b"))
        assert not (tmp_path / "a" / "b").exists()
        assert len(os.listdir("/proc/self/fd")) == descriptors

    def test_below_a_file(self, tmp_path):
        (tmp_path / "a").touch()
        with pytest.raises(NotADirectoryError):
            make_directory(str(tmp_path / "a" / "b"))

    def test_a_relative_path(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        descriptor = make_directory("a/b")
        assert real_path(descriptor) == str(tmp_path / "a" / "b")
        os.close(descriptor)


def test_the_real_path_has_no_links(tmp_path, opened):
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    assert real_path(opened("link")) == str(tmp_path / "a")
