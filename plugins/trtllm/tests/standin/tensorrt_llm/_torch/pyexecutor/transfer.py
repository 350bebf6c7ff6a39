"""KV blocks on their way from a prefill engine to a decode engine, over a real loopback TCP socket.

The receiver connects and sends the key of the offer (16 bytes). The sender answers with the length (8 bytes, 0 for an
unknown key) and the bytes. The receiver checks their digest and acknowledges with one byte, and the sender frees them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable

_HOST = "127.0.0.1"
_LENGTH = struct.Struct("!Q")
_ACK = b"k"
_KEY_BYTES = 16


def block_bytes(tokens: list[int], blocks: int) -> bytes:
    """Return the bytes of a prompt's blocks: TLLM_STANDIN_BLOCK_BYTES (4096) for each."""
    size = int(os.environ.get("TLLM_STANDIN_BLOCK_BYTES", "4096")) * blocks
    return hashlib.shake_128(repr(tokens).encode()).digest(size)


class TransferSender:
    """Offer blocks until they are fetched; `on_done(key)` is called from a thread of the sender."""

    def __init__(self, on_done: Callable[[bytes], None]) -> None:
        self._offers: dict[bytes, bytes] = {}
        self._on_done = on_done
        self._socket = socket.create_server((_HOST, 0))
        self._thread = threading.Thread(target=self._serve, name="kv_transfer_sender", daemon=True)
        self._thread.start()

    def offer(self, data: bytes) -> tuple[bytes, bytes]:
        """Keep `data` for one receiver; return its key and the state that the receiver needs."""
        key = os.urandom(_KEY_BYTES)
        self._offers[key] = data
        state = {
            "host": _HOST,
            "port": self._socket.getsockname()[1],
            "key": key.hex(),
            "size": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        return key, json.dumps(state).encode()

    def withdraw(self, key: bytes) -> None:
        """Drop an offer that nobody fetched."""
        self._offers.pop(key, None)

    def close(self) -> None:
        """Stop serving."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._send, args=(peer,), name="kv_transfer_send", daemon=True).start()

    def _send(self, peer: socket.socket) -> None:
        with peer, contextlib.suppress(OSError):
            key = _receive(peer, _KEY_BYTES)
            data = self._offers.get(key, b"")
            peer.sendall(_LENGTH.pack(len(data)) + data)
            if data and peer.recv(1) == _ACK and self._offers.pop(key, None) is not None:
                self._on_done(key)


def fetch(state: bytes, timeout_s: float) -> int:
    """Fetch the blocks that `state` offers; return their size in bytes.

    TLLM_STANDIN_TRANSFER_SECONDS (0) is waited first. Raises OSError and ValueError when the transfer fails.
    """
    offer = json.loads(state)
    time.sleep(float(os.environ.get("TLLM_STANDIN_TRANSFER_SECONDS", "0")))
    with socket.create_connection((offer["host"], offer["port"]), timeout=timeout_s) as peer:
        peer.sendall(bytes.fromhex(offer["key"]))
        size = _LENGTH.unpack(_receive(peer, _LENGTH.size))[0]
        if size != offer["size"]:
            raise ValueError(f"the prefill engine offers {size} bytes, expected {offer['size']}")
        data = _receive(peer, size)
        if hashlib.sha256(data).hexdigest() != offer["sha256"]:
            raise ValueError("the digest of the received blocks does not match")
        peer.sendall(_ACK)
    return size


def _receive(peer: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = peer.recv(min(size - len(data), 1 << 20))
        if not chunk:
            raise ConnectionError(f"the peer closed after {len(data)} of {size} bytes")
        data += chunk
    return bytes(data)
