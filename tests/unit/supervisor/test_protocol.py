"""What supervisor and worker agree on, and how the times fit together."""

from __future__ import annotations

import subprocess
import sys

from dynamo_worker.supervisor import cleaning_times, protocol


def test_the_kill_leaves_time_to_clean_up():
    """Both are taken off the end of the termination grace period."""
    assert protocol.KILL_RESERVE >= cleaning_times.TAKE_OVER_RESERVE + cleaning_times.SHORTEST_CLEANING


def test_signals_of_one_moment_are_over_before_anybody_can_press_again():
    assert 0 < protocol.SIGNAL_DEBOUNCE < cleaning_times.AT_ONCE < protocol.FORCED_STOP


def test_it_imports_nothing():
    """The worker reads it before anything else."""
    code = "import sys, dynamo_worker.supervisor.protocol; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    allowed = {"dynamo_worker", "dynamo_worker.supervisor", "dynamo_worker.supervisor.protocol"}
    assert {name for name in done.stdout.split() if name.startswith("dynamo_worker")} == allowed
