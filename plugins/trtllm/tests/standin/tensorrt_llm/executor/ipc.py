"""Queues between processes: pickled objects over loopback ZMQ, each signed with the key of its queue."""

from __future__ import annotations

import hashlib
import hmac
import pickle
import secrets
import threading
import time
from typing import Any

import zmq

DIGEST_BYTES = hashlib.sha256().digest_size


def sign(key: bytes, obj: Any) -> bytes:
    """Pickle an object and append its HMAC."""
    data = pickle.dumps(obj)
    return data + hmac.digest(key, data, "sha256")


def verify(key: bytes, message: bytes) -> Any:
    """Unpickle what `sign` made; raise RuntimeError for a wrong signature."""
    data, digest = message[:-DIGEST_BYTES], message[-DIGEST_BYTES:]
    if not hmac.compare_digest(hmac.digest(key, data, "sha256"), digest):
        raise RuntimeError("HMAC verification failed")
    return pickle.loads(data)


class ZeroMqQueue:
    """A PAIR socket. The server makes address and key, the client is given both.

    Without a peer, `put` blocks: this is what makes an abort hang when rank 0 is dead.
    """

    def __init__(
        self,
        address: tuple[str, bytes | None] | None = None,
        *,
        socket_type: int = zmq.PAIR,
        is_server: bool,
        name: str | None = None,
        use_hmac_encryption: bool = True,
    ) -> None:
        if not use_hmac_encryption:
            raise ValueError("the stand-in signs every queue")
        endpoint, key = address or ("tcp://127.0.0.1:*", None)
        self.name = name
        self.hmac_key = key or secrets.token_bytes(32)
        self.socket = zmq.Context.instance().socket(socket_type)
        self.socket.set_hwm(0)
        # A ZMQ socket is not for two threads at once, and the loop of the caller, the monitor and exit hooks all send.
        self._send_lock = threading.Lock()
        if is_server:
            self.socket.bind(endpoint)
            endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        else:
            self.socket.connect(endpoint)
        self.address = (endpoint, self.hmac_key)

    def put(self, obj: Any) -> None:
        """Send an object; block as long as there is no peer."""
        with self._send_lock:
            self.socket.send(sign(self.hmac_key, obj))

    def put_noblock(self, obj: Any, *, retry: int = 1, wait_time: float = 0.001) -> bool:
        """Send an object if that needs no waiting, else try again `retry` times; tell whether it was sent."""
        for attempt in range(retry + 1):
            if attempt:
                time.sleep(wait_time)
            if not self._send_lock.acquire(blocking=False):
                continue
            try:
                self.socket.send(sign(self.hmac_key, obj), flags=zmq.NOBLOCK)
            except zmq.Again:
                continue
            finally:
                self._send_lock.release()
            return True
        return False

    def poll(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for an object; tell whether there is one."""
        return bool(self.socket.poll(round(timeout * 1000), zmq.POLLIN))

    def get(self) -> Any:
        """Wait for the next object without bound."""
        return verify(self.hmac_key, self.socket.recv())

    def close(self, linger_s: float = 0.0) -> None:
        """Close the socket; give what is unsent `linger_s` seconds."""
        self.socket.close(linger=round(linger_s * 1000))


IpcQueue = ZeroMqQueue
FusedIpcQueue = ZeroMqQueue
