"""A process that is stopped, and so does not act on any signal but SIGKILL and SIGCONT."""

import os
import signal

if os.fork() == 0:
    os.kill(os.getpid(), signal.SIGSTOP)
    os._exit(0)
os.waitpid(-1, os.WUNTRACED)
os.write(1, b"up\n")
os.kill(os.getpid(), signal.SIGSTOP)
