from __future__ import annotations

import os
import subprocess
import time

import pytest

from dynamo_worker.supervisor.removal import remove_contents


@pytest.fixture
def root(tmp_path):
    path = tmp_path / "root"
    path.mkdir()
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    yield path, descriptor
    os.close(descriptor)


def later() -> float:
    return time.monotonic() + 20


def dig(descriptor: int, name: str, levels: int) -> None:
    """Make directories in one another, deeper than any path can say."""
    current = os.dup(descriptor)
    for _ in range(levels):
        os.mkdir(name, dir_fd=current)
        below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=current)
        os.close(current)
        current = below
    os.close(os.open("bottom", os.O_CREAT | os.O_WRONLY, dir_fd=current))
    os.close(current)


@pytest.mark.parametrize(("name", "levels"), [("d", 3000), ("n" * 200, 100)])
def test_deep(root, name, levels):
    path, descriptor = root
    dig(descriptor, name, levels)
    assert remove_contents(descriptor, later()) == []
    assert os.listdir(path) == []


def test_wide_and_nested(root):
    path, descriptor = root
    for number in range(300):
        (path / str(number) / "a").mkdir(parents=True)
        (path / str(number) / "b").mkdir()
        (path / str(number) / "a" / "file").touch()
        (path / str(number) / "link").symlink_to(path)
    (path / "keep").touch()
    assert remove_contents(descriptor, later(), keep=("keep",)) == []
    assert os.listdir(path) == ["keep"]


def test_links_are_not_followed(root, tmp_path):
    path, descriptor = root
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").touch()
    (path / "link").symlink_to(tmp_path / "outside")
    assert remove_contents(descriptor, later()) == []
    assert (tmp_path / "outside" / "precious").exists()


def test_a_directory_that_becomes_a_link(root, tmp_path, monkeypatch):
    """Whoever swaps them while we remove must not lead us elsewhere."""
    path, descriptor = root
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").touch()
    (path / "directory").mkdir()
    opened = os.open

    def swap(name, *arguments, **keywords):
        if name == "directory":
            (path / "directory").rmdir()
            (path / "directory").symlink_to(tmp_path / "outside")
        return opened(name, *arguments, **keywords)

    monkeypatch.setattr(os, "open", swap)
    assert remove_contents(descriptor, later()) == ["directory: Not a directory"]
    assert (tmp_path / "outside" / "precious").exists()
    assert remove_contents(descriptor, later()) == []


@pytest.mark.parametrize("options", [["-t", "tmpfs", "none"], ["--bind", "precious"]])
def test_what_is_mounted_there_stays(root, tmp_path, options):
    path, descriptor = root
    (path / "a" / "mounted").mkdir(parents=True)
    (tmp_path / "precious").mkdir()
    if subprocess.run(["mount", *options, path / "a" / "mounted"], cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("cannot mount here")
    try:
        (path / "a" / "mounted" / "file").touch()
        problems = remove_contents(descriptor, later())
        assert any("busy" in problem for problem in problems)
        assert (path / "a" / "mounted" / "file").exists()
    finally:
        subprocess.run(["umount", path / "a" / "mounted"], check=True)
    assert remove_contents(descriptor, later()) == []


def test_problems_are_counted(root, monkeypatch):
    path, descriptor = root
    for number in range(50):
        (path / str(number)).touch()

    def refuse(name, **_):
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        problems = remove_contents(descriptor, later())
    assert [problem.partition(": ")[2] for problem in problems[:3]] == ["Operation not permitted"] * 3
    assert problems[3:] == ["and 47 more"]


def test_no_time_left(root):
    path, descriptor = root
    dig(descriptor, "d", 3)
    assert remove_contents(descriptor, time.monotonic() - 1) == []  # a few are removed in any case
    dig(descriptor, "d", 500)
    assert remove_contents(descriptor, time.monotonic() - 1) == ["no time left; the next start removes the rest"]
    assert os.listdir(path) == ["d"]


def test_no_descriptor_stays_open(root):
    _, descriptor = root
    before = len(os.listdir("/proc/self/fd"))
    dig(descriptor, "d", 200)
    remove_contents(descriptor, time.monotonic() - 1)
    remove_contents(descriptor, later())
    assert len(os.listdir("/proc/self/fd")) == before
