from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dynamo_worker.supervisor import ledger, shared_memory
from dynamo_worker.supervisor.shared_memory import SegmentWatch

SHM = Path(shared_memory.DIRECTORY)


@pytest.fixture
def make():
    """Makes segments that are mapped here, open here, or neither; removes them afterwards."""
    made = []
    keep = []

    def one(how: str) -> tuple[str, int]:
        name = f"dwtest-{os.getpid()}-{len(made)}"
        made.append(name)
        descriptor = os.open(SHM / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.ftruncate(descriptor, 4096)
        if how == "mapped":
            keep.append(mmap.mmap(descriptor, 4096))
        inode = os.fstat(descriptor).st_ino
        if how == "open":
            keep.append(os.fdopen(descriptor, "rb"))
        else:
            os.close(descriptor)
        return name, inode

    yield one
    for thing in keep:
        thing.close()
    for name in made:
        (SHM / name).unlink(missing_ok=True)


def test_segments_of(make):
    mapped, opened, unused = make("mapped"), make("open"), make("unused")
    found = shared_memory.segments_of(os.getpid())
    assert {mapped[1], opened[1]} <= found
    assert unused[1] not in found
    assert shared_memory.segments_of(2**22 + 1) == set()


def test_only_what_nobody_uses_is_removed(make):
    mapped, opened, unused = make("mapped"), make("open"), make("unused")
    another = make("unused")
    changed = (another[0], another[1] + 1)  # the name was recorded for a segment that is gone
    assert shared_memory.remove_unused([mapped, opened, unused, changed, ("missing", 7), ("zero\0", 7)]) == [unused[0]]
    assert not (SHM / unused[0]).exists()
    assert all((SHM / name).exists() for name, _ in (mapped, opened, another))


def test_in_use(make):
    before, mapped, opened, unused = make("mapped"), make("mapped"), make("open"), make("unused")
    os.utime(SHM / before[0])  # changes ctime to now, as any change does
    assert shared_memory.in_use([os.getpid()], time.time() + 60) == {}
    found = shared_memory.in_use([os.getpid(), 2**22 + 1], time.time() - 60)
    assert dict([before, mapped, opened]).items() <= found.items()
    assert unused[0] not in found


def test_the_shared_memory_of_a_container_is_another(make):
    """Its numbers are as small as ours: a process of it must not keep our segments."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    name, inode = make("unused")
    code = f"""
import os, sys
number = 0
while number < {inode}:
    kept = open(f"/dev/shm/{{number}}", "w")
    number = os.fstat(kept.fileno()).st_ino
print(number, flush=True)
sys.stdin.read()
"""
    mount = 'mount -t tmpfs none /dev/shm && exec "$@"'
    with subprocess.Popen(
        ["unshare", "-m", "sh", "-c", mount, "sh", sys.executable, "-c", code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as container:  # fmt: skip
        if container.stdout.readline() != b"%d\n" % inode:
            pytest.skip("no segment of the same number could be made")
        assert shared_memory.remove_unused([(name, inode)]) == [name]
        container.stdin.close()


def test_names_cannot_lead_out_of_the_directory(tmp_path):
    victim = tmp_path / "victim"
    victim.touch()
    name = os.path.relpath(victim, SHM)
    assert shared_memory.remove_unused([(name, victim.stat().st_ino)]) == []
    assert victim.exists()


class TestWatch:
    @pytest.fixture
    def watch(self, tmp_path):
        watch = SegmentWatch(str(tmp_path), lambda: [os.getpid()])
        yield watch
        watch.close()

    def look_up_again(self, watch) -> None:
        time.sleep(max(0.0, watch.due() - time.monotonic()))
        watch.look_up()

    def test_ours_are_recorded_and_others_are_not(self, watch, make, tmp_path):
        mapped, unused = make("mapped"), make("unused")
        assert watch.due() is None
        watch.read()
        assert watch.due() is not None
        watch.look_up()
        assert (watch.recorded.get(mapped[0]), watch.recorded.get(unused[0])) == (mapped[1], None)
        assert mapped in ledger.read_segments(tmp_path)
        self.look_up_again(watch)
        assert unused[0] not in watch.recorded
        assert watch.due() is None  # twice is enough

    def test_removed_ones_are_forgotten(self, watch, make):
        mapped, unused = make("mapped"), make("unused")
        watch.read()
        watch.look_up()
        self.look_up_again(watch)
        for name in (mapped[0], unused[0]):
            (SHM / name).unlink()
        watch.read()
        assert mapped[0] not in watch.recorded
        assert watch.due() is None

    def test_a_renamed_one_is_found_under_its_new_name(self, watch, make):
        name, inode = make("mapped")
        new = name + "-new"
        os.rename(SHM / name, SHM / new)
        try:
            watch.read()
            watch.look_up()
            assert watch.recorded[new] == inode
            assert name not in watch.recorded
        finally:
            (SHM / new).unlink()

    def test_each_is_looked_up_at_once(self, watch, make):
        for _ in range(3):
            name, inode = make("mapped")
            watch.read()
            assert watch.due() <= time.monotonic()
            watch.look_up()
            assert watch.recorded[name] == inode

    def test_one_that_is_not_used_yet_is_looked_up_again(self, watch, make):
        make("unused")
        watch.read()
        watch.look_up()
        assert watch.due() > time.monotonic() + 0.05
        make("unused")  # another one does not take the second chance from it
        watch.read()
        watch.look_up()
        assert len(watch._lookups) == 2

    def test_lookups_are_limited_in_their_share_of_time(self, make, tmp_path):
        def slow():
            time.sleep(0.1)
            return []

        watch = SegmentWatch(str(tmp_path), slow)
        try:
            for _ in range(3):
                make("unused")
                watch.read()
                watch.look_up()
            make("unused")
            watch.read()
            assert time.monotonic() + 1.0 < watch.due() < time.monotonic() + 2.0
        finally:
            watch.close()

    def test_what_the_worker_held_when_it_died(self, watch, make, tmp_path):
        """It was made since the last lookup: nobody can tell any more whose it was, but for when it was let go of."""
        code = """if True:
            import os, sys
            os.umask(0)
            *private, shared = sys.argv[1:]
            for path in private:
                os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            os.open(shared, os.O_RDWR | os.O_CREAT, 0o640)
            os.kill(os.getpid(), 9)
        """
        names = [f"dwtest-dead-{os.getpid()}-{number}" for number in range(2)]
        shared = f"dwtest-shared-{os.getpid()}"  # no library makes one that others may open
        held, foreign = make("open"), make("unused")
        try:
            time.sleep(0.3)
            watch.read()
            assert foreign[0] in watch._closed
            watch._closed[foreign[0]] -= 0.3  # as if it had been read when it happened
            subprocess.run([sys.executable, "-c", code, *(str(SHM / name) for name in (*names, shared))], check=False)
            watch.claim()
            assert set(watch.recorded) == set(names)
            assert held[0] not in watch.recorded
            assert sorted(shared_memory.remove_unused(watch.recorded.items())) == names
            assert {name for name, _ in ledger.read_segments(tmp_path)} == set(names)
        finally:
            for name in (*names, shared):
                (SHM / name).unlink(missing_ok=True)

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can make one")
    def test_what_another_user_let_go_of_at_that_moment(self, watch, make):
        name, _ = make("unused")
        os.chown(SHM / name, 12345, 12345)
        watch.claim()
        assert watch.recorded == {}

    def test_a_flood_of_events_is_read_in_parts(self, watch, make, monkeypatch):
        """Somebody makes segments faster than we read of them."""
        make("unused")
        events = iter([os.read(watch.descriptor, 1 << 16)] * 1000)
        monkeypatch.setattr(os, "read", lambda *_: next(events))
        watch.read()
        assert watch.due() is not None

    def test_no_descriptor_left_is_no_end(self, make, tmp_path):
        def tree() -> list[int]:
            raise OSError(24, "Too many open files")

        watch = SegmentWatch(str(tmp_path), tree)
        try:
            make("mapped")
            watch.read()
            watch.look_up()
            assert watch.due() > time.monotonic() + 1.0  # later, and not again and again
        finally:
            watch.close()

    def test_a_full_disk_is_no_end(self, watch, make, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(ledger, "write_segments", full)
        name, inode = make("mapped")
        watch.read()
        watch.look_up()
        assert watch.recorded[name] == inode
