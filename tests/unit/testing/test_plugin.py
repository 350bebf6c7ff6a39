"""The fixtures fail the tests that leave something behind, in a pytest of their own."""

from __future__ import annotations

import re
import subprocess
import sys

TESTS = """
import os, subprocess, sys
from dynamo_worker.testing.leftovers import MARKER

def test_tidy(no_leftovers, marker):
    with subprocess.Popen([sys.executable, "-c", ""], env={**os.environ, MARKER: marker}):
        pass

def test_file(no_leftovers):
    (no_leftovers.tmp / "forgotten").touch()

def test_cluster_is_private(cluster, tmp_path):
    assert cluster.discovery.is_dir()
    assert tmp_path in cluster.discovery.parents
    assert cluster.engine_args == ["--engine", "echo"]

class TestOther:
    import pytest

    @pytest.fixture
    def engine_args(self):
        return ["--engine", "other"]

    def test_engine_args_can_be_overridden(self, cluster):
        assert cluster.engine_args == ["--engine", "other"]
"""


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
        "test_cluster_is_private": "PASSED",
        "test_engine_args_can_be_overridden": "PASSED",
    }, result.stdout
    assert "forgotten" in result.stdout
