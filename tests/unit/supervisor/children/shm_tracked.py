"""Holds segments and a semaphore that a resource tracker knows of; names go to $SHM_NAMES. Its own child, too."""

import multiprocessing
import os
import time
from multiprocessing import shared_memory


def hold(child):
    held = [shared_memory.SharedMemory(create=True, size=12345) for _ in range(2)]
    semaphore = multiprocessing.get_context("spawn").Semaphore()
    with open(os.environ["SHM_NAMES"], "a") as file:
        file.writelines(segment._name.lstrip("/") + "\n" for segment in held)
        file.write("sem." + semaphore._semlock.name.lstrip("/") + "\n")
    if child is not None:
        child.start()
        while not started.is_set():
            time.sleep(0.01)
        os.write(1, b"up\n")
    else:
        started.set()
    while True:
        time.sleep(1000)


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    started = context.Event()
    hold(context.Process(target=hold, args=(None,)))
