"""Creates segments as native code does: nobody but /proc knows them. Names go to $SHM_NAMES.

One is mapped and its descriptor closed, one only open, one is a semaphore that is mapped under another name.
"""

import _multiprocessing
import mmap
import os
import time

names = [f"dwtest-{os.getpid()}-{kind}" for kind in ("mapped", "open")]
keep = []
for name in names:
    descriptor = os.open(f"/dev/shm/{name}", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.ftruncate(descriptor, 4096)
    if name.endswith("mapped"):
        keep.append(mmap.mmap(descriptor, 4096))
        os.close(descriptor)
    time.sleep(0.15)
semaphore = _multiprocessing.SemLock(0, 1, 1, f"/dwtest-{os.getpid()}", False)
names.append(f"sem.dwtest-{os.getpid()}")
with open(os.environ["SHM_NAMES"], "a") as file:
    file.write("\n".join(names) + "\n")
time.sleep(0.5)  # the guardian looks again after a tenth of a second
os.write(1, b"up\n")
while True:
    time.sleep(1000)
