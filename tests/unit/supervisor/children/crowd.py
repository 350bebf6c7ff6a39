"""Makes as many sleeping children as the limit of processes allows, and keeps trying."""

import os
import signal
import time

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print(flush=True)
for _ in range(100_000):  # bounded, should nobody end it
    try:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
    except OSError:
        time.sleep(0.001)
