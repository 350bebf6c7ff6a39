"""Ids of disaggregated requests: unique over all workers, and above all local ids."""

from __future__ import annotations

import threading
import time

_TIMESTAMP_BITS, _NODE_BITS, _PROCESS_BITS, _COUNTER_BITS = 39, 8, 6, 10

# Local ids lie below, global ids from here on.
MIN_GLOBAL_ID = 1 << 40

_lock = threading.Lock()
_counter = 0


def get_global_disagg_request_id(node_id: int, process_id: int = 0) -> int:
    """Return an id made of milliseconds, node, process and a counter; raises ValueError for ids out of range."""
    global _counter
    if not 0 <= node_id < 1 << _NODE_BITS:
        raise ValueError(f"node_id: expected 0 to {(1 << _NODE_BITS) - 1}, got {node_id}")
    if not 0 <= process_id < 1 << _PROCESS_BITS:
        raise ValueError(f"process_id: expected 0 to {(1 << _PROCESS_BITS) - 1}, got {process_id}")
    with _lock:
        _counter = (_counter + 1) % (1 << _COUNTER_BITS)
        counter = _counter
    stamp = int(time.monotonic() * 1000) & ((1 << _TIMESTAMP_BITS) - 1)
    low = _NODE_BITS + _PROCESS_BITS + _COUNTER_BITS
    found = (stamp << low) | (node_id << (_PROCESS_BITS + _COUNTER_BITS)) | (process_id << _COUNTER_BITS) | counter
    return found if found >= MIN_GLOBAL_ID else found + MIN_GLOBAL_ID
