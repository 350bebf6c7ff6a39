"""Runs away: every process forks the next one and ends at once. Only killing the whole group catches it."""

import os
import time

if os.fork() == 0:
    os.write(1, b"up\n")
    limit = time.monotonic() + 20
    while time.monotonic() < limit:
        if os.fork() != 0:
            os._exit(0)
