"""The fixtures fail the tests that leave something behind, in a pytest of their own."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

TESTS = """
import os, subprocess, sys
import pytest
from dynamo_worker.testing import Subject
from dynamo_worker.testing.leftovers import MARKER

def test_tidy(no_leftovers, marker):
    with subprocess.Popen([sys.executable, "-c", ""], env={**os.environ, MARKER: marker}):
        pass

def test_file(no_leftovers):
    (no_leftovers.tmp / "forgotten").touch()

def test_without_a_subject(cluster):
    pass

class TestEngine:
    @pytest.fixture
    def subject(self):
        return Subject("other", ["--fast"], model="m", start_seconds=7.0)

    def test_cluster_is_private(self, cluster, tmp_path):
        assert cluster.discovery.is_dir()
        assert tmp_path in cluster.discovery.parents

    def test_cluster_is_the_subjects(self, cluster):
        assert cluster.engine_args == ["--engine", "other", "--fast"]
        assert (cluster.model, cluster.start_seconds) == ("m", 7.0)
"""


MARKED = """
import pytest

@pytest.mark.slow
def test_slow():
    pass

@pytest.mark.gpu
def test_gpu():
    pass
"""


@pytest.mark.parametrize(
    ("arguments", "ran"),
    [((), {"test_gpu"}), (("-m", "slow"), {"test_slow"}), (("-m", "slow or gpu"), {"test_slow", "test_gpu"})],
)
def test_slow_tests_run_on_request_only(tmp_path, arguments, ran):
    (tmp_path / "test_marked.py").write_text(MARKED)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "dynamo_worker.testing.plugin",
        "-c",
        "/dev/null",
        "--rootdir",
        ".",
    ]
    command += ["-p", "no:cacheprovider", "--strict-markers", "-W", "error", "-v", "test_marked.py", *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert set(re.findall(r"::(\w+) PASSED ", result.stdout)) == ran, result.stdout
    assert result.returncode == 0


def test_leftovers_fail_the_test_that_left_them(tmp_path):
    (tmp_path / "test_something.py").write_text(TESTS)
    result = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "pytest",
                "-p",
                "dynamo_worker.testing.plugin",
                "-c",
                "/dev/null",
                "--rootdir",
                ".",
            ),
            *("-p", "no:cacheprovider", "-v", "test_something.py"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    outcomes = dict(re.findall(r"::(\w+) (PASSED|FAILED|ERROR) ", result.stdout))
    assert outcomes == {
        "test_tidy": "PASSED",
        "test_file": "ERROR",
        "test_without_a_subject": "ERROR",
        "test_cluster_is_private": "PASSED",
        "test_cluster_is_the_subjects": "PASSED",
    }, result.stdout
    assert "define a fixture `subject`" in result.stdout
    assert "forgotten" in result.stdout
