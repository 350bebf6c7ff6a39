from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

from dynamo_worker.supervisor import mark

RTTIME = 15


def marked(soft: int, hard: int) -> int | None:
    """Return the mark of a process with these limits after a mark was put on it."""
    code = "import sys; from dynamo_worker.supervisor import mark; import os; mark.put_on_ourselves(int(sys.argv[1]))"
    code += "; print(mark.of(os.getpid()))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(2**61 + 5)],
        preexec_fn=lambda: resource.setrlimit(RTTIME, (soft, hard)),
        capture_output=True,
        text=True,
        check=True,
    )
    return None if done.stdout == "None\n" else int(done.stdout)


@pytest.mark.parametrize(
    ("soft", "hard", "result"),
    [
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 2**61 + 5),
        (2**61 + 4, resource.RLIM_INFINITY, 2**61 + 5),  # a worker that was started by another worker
        (1_000_000, resource.RLIM_INFINITY, None),  # somebody needs it
        (1_000_000, 1_000_000, None),
    ],
)
def test_put_on_ourselves(soft, hard, result):
    assert marked(soft, hard) == result


def test_none():
    assert mark.of(os.getpid()) is None
    assert mark.of(2**22 + 1) is None
    assert mark.draw() != mark.draw()
