"""What can go wrong, on demand: by environment variables read in the ranks or the proxy, and by prompts.

`TLLM_STANDIN_FAULT=KIND@MOMENT[:RANK]`, several separated by commas. The moments are `start` (the rank's task begins),
`load` (the proxy knows the ranks, the engine is not there yet), `ready` (right after READY) and `stepN` (before the
N-th iteration). Without a rank, rank 0 is meant. The kinds are those of `KINDS`.

A prompt that begins with `TRIGGER`, the number of a kind and a rank makes that kind happen when rank 0 takes the
request, before any engine sees it: `trigger("kill", rank=1)` makes such a prompt.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

#: Ids below the size of every vocabulary, unlikely to begin a prompt that means something else.
TRIGGER = (13, 7, 13, 7)
CUDA_TEXT = "CUDA error: an illegal memory access was encountered"


class TaskEnds(BaseException):
    """Makes the rank's task return as if told to: its future completes, with nothing wrong."""


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _exit() -> NoReturn:
    os._exit(1)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _raise() -> NoReturn:
    raise RuntimeError("stand-in: the executor loop crashed")


def _fatal() -> NoReturn:
    raise RuntimeError("Fatal error: CUDA error: device-side assert triggered")


def _abort() -> None:
    from mpi4py import MPI

    MPI.COMM_WORLD.Abort(137)


def _hang() -> NoReturn:
    while True:
        time.sleep(3600)


def _kill_orted() -> None:
    os.kill(os.getppid(), signal.SIGKILL)


def _return() -> NoReturn:
    raise TaskEnds


#: What happens in a rank. The place in this dict, from 1, is the number in a trigger.
KINDS: dict[str, Callable[[], None]] = {
    "kill": _kill,
    "exit": _exit,
    "stop": _stop,
    "raise": _raise,
    "fatal": _fatal,
    "abort": _abort,
    "hang": _hang,
    "kill_orted": _kill_orted,
    "return": _return,
}
#: What happens to requests in rank 0; the numbers go on.
REQUEST_KINDS = (
    "request_error",  # this request fails, with a text
    "cuda_error",  # so do all requests from now on, with a text that says the device is gone
    "request_exception",  # this request fails with an exception object, which the proxy takes for a fatal error
    "ignore_abort",  # this request, without the trigger, is never cancelled
    "silent_stats",  # no statistics and KV events any more
)
_NUMBERS = {kind: number for number, kind in enumerate([*KINDS, *REQUEST_KINDS], 1)}
_NAMES = {number: kind for kind, number in _NUMBERS.items()}
_PATTERN = re.compile(r"(\w+)@(start|load|ready|step\d+)(?::(\d+))?")


def trigger(kind: str, rank: int = 0) -> list[int]:
    """Make the beginning of a prompt that breaks something."""
    return [*TRIGGER, _NUMBERS[kind], rank + 1]


def triggered(prompt: list[int]) -> tuple[str, int] | None:
    """Return kind and rank if a prompt begins with a trigger."""
    if tuple(prompt[: len(TRIGGER)]) != TRIGGER or len(prompt) < len(TRIGGER) + 2:
        return None
    number, rank = prompt[len(TRIGGER) : len(TRIGGER) + 2]
    return (_NAMES[number], rank - 1) if number in _NAMES else None


def at(moment: str, rank: int) -> None:
    """Let happen what the environment asks for at this moment in this rank; raise ValueError for nonsense."""
    for text in filter(None, os.environ.get("TLLM_STANDIN_FAULT", "").split(",")):
        match = _PATTERN.fullmatch(text.strip())
        if match is None or match[1] not in KINDS:
            raise ValueError(f"TLLM_STANDIN_FAULT: expected KIND@MOMENT[:RANK] KIND of {list(KINDS)}, got {text!r}")
        if match[2] == moment and int(match[3] or 0) == rank:
            if moment == "load":
                time.sleep(0.3)  # ZMQ sends in the background: the identities have to get out
            print(f"stand-in: {match[1]} in rank {rank} at {moment}", file=sys.stderr, flush=True)
            KINDS[match[1]]()


def enabled(name: str, default: bool = False) -> bool:
    """Read a switch: 1 or 0 in `TLLM_STANDIN_<name>`."""
    return os.environ.get(f"TLLM_STANDIN_{name}", "1" if default else "0") == "1"


def seconds(name: str, default: float) -> float:
    """Read a time in seconds from `TLLM_STANDIN_<name>`."""
    return float(os.environ.get(f"TLLM_STANDIN_{name}", default))
