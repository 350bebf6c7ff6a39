"""Ignores every signal that can be ignored, and has a child of its own that does so, too."""

import contextlib
import os
import signal
import sys
import time

for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
    with contextlib.suppress(OSError):
        signal.signal(number, signal.SIG_IGN)
os.fork()
os.write(1, b"up\n")
sys.stdin.close()
while True:
    time.sleep(1000)
