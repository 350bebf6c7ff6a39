"""What a worker and a process of its engine say to each other: JSON objects, one a line, over a Unix socket.

The process finds the descriptor of its socket in the environment variable :data:`VARIABLE`. Engines written in Python
need none of this: they derive from :class:`~dynamo_worker.kit.child_loop.StepEngine` or
:class:`~dynamo_worker.kit.child_tasks.TaskEngine`. Others speak as follows; both sides ignore keys that they do not
know.

======================================== ===========================================================================
to the process
``start`` OPTIONS, ``most_bytes`` N      once, first; no line of the process may be longer than ``most_bytes``
``add`` N, ``id`` ID, ``payload`` ANY    a request; its number N is never used again
``abort`` N                              stop the work for a request; it may have ended
``pause`` N, ``resume`` N                the client does not keep up; without the pause, its answer waits in the worker
``ask`` N, ``question``, ``payload``     a question to the engine, to be answered
``ping`` N                               to be answered between two steps
to the worker
``ready`` INFO                           once, when requests may come
``chunks`` [N, CHUNK, N, CHUNK, …],      chunks of a step, each after the number of its request, and the numbers of
``ended`` [N, …]                         requests that have ended
``error`` N, ``message``, ``refused``    a request has failed; ``refused`` if it is the client's fault
``answer`` N, ``value`` or ``error``     the answer to a question or a ping
``failed`` TEXT                          the engine is beyond repair, and why: a traceback
an empty object                          progress without a chunk, such as a part of a long prefill
======================================== ===========================================================================

The end of the connection ends either side. Standard library only: engines' processes import it first.
"""

from __future__ import annotations

import json
from typing import Any, Final

#: The environment variable with the descriptor of the process's socket.
VARIABLE: Final = "DYNAMO_WORKER_CHILD_FD"
#: Most bytes of one line to the worker, unless the engine says otherwise: reading it takes its event loop about 40 ms.
MOST_BYTES: Final = 4 << 20

#: A value that contains itself is a RecursionError: looking for those takes a third of the time.
_encode = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


def line(message: dict[str, Any]) -> bytes:
    """Return a message as a line.

    :raises TypeError, ValueError, RecursionError: it cannot be written as JSON.
    """
    return _encode(message).encode() + b"\n"


def message(text: bytes) -> dict[str, Any]:
    """Return the message of a line.

    :raises ValueError: it is none.
    """
    try:
        found = json.loads(text.decode())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError("not an object")
    return found


class Lines:
    """Divides what arrives into lines."""

    def __init__(self, most_bytes: int | None = None) -> None:
        """Begin without data.

        :param most_bytes: length limit of a line; None for no limit.
        """
        self._most_bytes = most_bytes
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Return the lines that are complete with this data, without their ends.

        :raises ValueError: a line is too long.
        """
        *lines, rest = data.split(b"\n")
        if lines and self._rest:
            lines[0] = bytes(self._rest) + lines[0]
            self._rest.clear()
        self._rest += rest
        if self._most_bytes is not None:
            longest = max(len(self._rest), max(map(len, lines), default=0))
            if longest > self._most_bytes:
                raise ValueError(f"a message of more than {self._most_bytes} bytes")
        return lines
