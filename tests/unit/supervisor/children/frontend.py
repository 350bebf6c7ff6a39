"""A frontend with streams: ends when it was asked to and a file says that they are done."""

import os
import signal
import sys
import time

asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
os.write(1, b"up\n")
while not asked or not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
