"""Leaves a zombie behind whose parent is gone: somebody has to reap it, soon and quietly."""

import os

if os.fork() == 0:
    if os.fork() == 0:
        os._exit(7)
    os._exit(0)
os.write(1, b"up\n")
