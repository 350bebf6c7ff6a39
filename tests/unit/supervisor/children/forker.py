"""Hides: a double fork with new sessions, whose last process keeps forking short-lived children."""

import os
import time

if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setsid()
        os.write(1, b"up\n")
        while True:
            if os.fork() == 0:
                time.sleep(0.02)
                os._exit(0)
            time.sleep(0.01)
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                pass
    os._exit(0)
os.wait()
