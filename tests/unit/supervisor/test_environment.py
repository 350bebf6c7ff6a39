"""What the worker inherits that the supervisor did not."""

from __future__ import annotations

import os
import tempfile

import pytest

from dynamo_worker.supervisor.environment import lasting_cache, user_name, worker_environment
from dynamo_worker.supervisor.run_directory import RunDirectory


@pytest.fixture
def run_directory(monkeypatch):
    with tempfile.TemporaryDirectory(prefix="dwt-") as place:  # pytest's own are too long for unix sockets
        monkeypatch.setenv("TMPDIR", place)
        directory = RunDirectory.create()
        yield directory
        directory.close()


class TestWorkerEnvironment:
    def test_what_is_added(self, run_directory, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("LOGNAME", "ada")
        for name in ("TORCHINDUCTOR_CACHE_DIR", "PYTHONSAFEPATH", "PYTHONHASHSEED"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", raising=False)
        environment = worker_environment(run_directory, 7)
        added = {name: value for name, value in environment.items() if os.environ.get(name) != value}
        assert added == {
            "DYNAMO_WORKER_CONTROL_FD": "7",
            "DYNAMO_WORKER_RUN_DIR": run_directory.path,
            "TMPDIR": run_directory.temporary,
            "PYTHONSAFEPATH": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache/dynamo-worker/torchinductor_ada"),
            "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
            "PYTHONHASHSEED": "0",
        }

    def test_what_the_user_has_set_stays(self, run_directory, monkeypatch):
        own = {
            "TORCHINDUCTOR_CACHE_DIR": "/elsewhere",
            "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "1",
            "PYTHONSAFEPATH": "yes",
            "PYTHONHASHSEED": "random",
        }
        for name, value in own.items():
            monkeypatch.setenv(name, value)
        environment = worker_environment(run_directory, 7)
        assert {name: environment[name] for name in own} == own

    def test_systemd_is_the_supervisors(self, run_directory, monkeypatch):
        names = {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}
        for name in names:
            monkeypatch.setenv(name, "1")
        assert not names & worker_environment(run_directory, 7).keys()


class TestUserName:
    @pytest.fixture(autouse=True)
    def nobody(self, monkeypatch):
        for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
            monkeypatch.delenv(name, raising=False)

    @pytest.mark.parametrize("variable", ["LOGNAME", "USER", "LNAME", "USERNAME"])
    def test_from_the_environment(self, monkeypatch, variable):
        monkeypatch.setenv(variable, "ada")
        assert user_name() == "ada"

    def test_no_character_leads_to_another_directory(self, monkeypatch):
        monkeypatch.setenv("USER", 'a/b\\c:d*e?f"g<h>i|j')
        assert user_name() == "a_b_c_d_e_f_g_h_i_j"

    def test_a_user_without_an_entry_is_called_by_number(self, monkeypatch):
        monkeypatch.setattr(os, "getuid", lambda: 4123456789)
        assert user_name() == "4123456789"


class TestCompiledKernels:
    """They are run as code, and their usual place is easy to guess."""

    @pytest.fixture
    def base(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        (tmp_path / "base").mkdir()
        return tmp_path / "base"

    def test_the_usual_place_if_it_is_there(self, base):
        (base / "torchinductor_x").mkdir(mode=0o755)
        assert lasting_cache(str(base), "torchinductor_x") == str(base / "torchinductor_x")
        assert (base / "torchinductor_x").stat().st_mode & 0o777 == 0o700

    def test_no_temporary_file_is_made_for_it(self, base, tmp_path):
        second = tmp_path / "cache" / "dynamo-worker" / "torchinductor_x"
        assert lasting_cache(str(base), "torchinductor_x") == str(second)
        assert second.stat().st_mode & 0o777 == 0o700
        assert not list(base.iterdir())

    def test_the_usual_place_is_made_where_there_is_no_home(self, base, tmp_path):
        (tmp_path / "cache").touch()
        assert lasting_cache(str(base), "torchinductor_x") == str(base / "torchinductor_x")
        assert (base / "torchinductor_x").stat().st_mode & 0o777 == 0o700

    @pytest.mark.parametrize("trouble", ["link", "writable", "file", "another user"])
    def test_a_place_that_somebody_else_may_have_made(self, base, tmp_path, trouble):
        place = base / "torchinductor_x"
        if trouble == "link":
            (tmp_path / "elsewhere").mkdir()
            place.symlink_to(tmp_path / "elsewhere")
        elif trouble == "file":
            place.touch()
        else:
            place.mkdir()
            place.chmod(0o777 if trouble == "writable" else 0o700)
            if trouble == "another user":
                if os.geteuid() != 0:
                    pytest.skip("only root can make one")
                os.chown(place, 12345, 12345)
        second = tmp_path / "cache" / "dynamo-worker" / "torchinductor_x"
        assert lasting_cache(str(base), "torchinductor_x") == str(second)
        second.chmod(0o722)
        assert lasting_cache(str(base), "torchinductor_x") is None

    def test_nothing_is_made_in_the_home_directory_of_another_user(self, base, tmp_path, monkeypatch):
        """As with `sudo -E`: who owns a directory above it could put another one in its place."""
        if os.geteuid() != 0:
            pytest.skip("only root can make one")
        home = tmp_path / "home"
        (home / ".cache").mkdir(parents=True)
        for path in (home, home / ".cache"):
            os.chown(path, 12345, 12345)
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(home))
        assert lasting_cache(str(base), "torchinductor_x") == str(base / "torchinductor_x")
        assert not list((home / ".cache").iterdir())

    def test_a_place_that_was_made_there_before(self, base, tmp_path):
        if os.geteuid() != 0:
            pytest.skip("only root can make one")
        place = tmp_path / "cache" / "dynamo-worker" / "torchinductor_x"
        place.mkdir(parents=True, mode=0o700)
        os.chown(tmp_path / "cache", 12345, 12345)
        assert lasting_cache(str(base), "torchinductor_x") == str(base / "torchinductor_x")

    @pytest.mark.parametrize("mode", [0o777, 0o1777])
    def test_a_home_directory_that_others_may_write(self, base, tmp_path, mode):
        """Such as HOME=/tmp: the sticky bit keeps what is made there in its place."""
        cache = tmp_path / "cache"
        cache.mkdir()
        cache.chmod(mode)
        place = lasting_cache(str(base), "torchinductor_x")
        assert place == str((cache / "dynamo-worker" if mode == 0o1777 else base) / "torchinductor_x")
        assert bool(list(cache.iterdir())) == (mode == 0o1777)

    def test_a_base_that_others_may_write(self, base, tmp_path):
        (tmp_path / "cache").touch()
        base.chmod(0o777)
        assert lasting_cache(str(base), "torchinductor_x") is None

    @pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HOME"])
    def test_a_relative_home_is_none(self, base, tmp_path, monkeypatch, variable):
        """It would be another one for each working directory."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv(variable, "relative")
        assert lasting_cache(str(base), "torchinductor_x") == str(base / "torchinductor_x")
        assert os.listdir(tmp_path) == ["base"]

    def test_a_link_on_the_way_to_it_may_lead_elsewhere_later(self, base, tmp_path, monkeypatch):
        (tmp_path / "real").mkdir()
        (tmp_path / "cache").symlink_to("real")
        place = lasting_cache(str(base), "torchinductor_x")
        assert place == str(tmp_path / "real" / "dynamo-worker" / "torchinductor_x")
