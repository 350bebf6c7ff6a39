"""Disaggregated serving: where the prefill and the decode worker meet.

The decode worker fetches the KV cache from the prefill worker. Both name the same room on the bootstrap server inside
the prefill worker. The router chooses the room; if it does not, the prefill worker does.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker import InvalidRequestError
from dynamo_worker.kit import disaggregation
from dynamo_worker.kit import request_limits as limits
from dynamo_worker.kit.canary import is_canary
from dynamo_worker.kit.fields import integer, refusal, section, string

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_worker.engine import Send
    from dynamo_worker.kit.fields import Reader
    from dynamo_worker.requests import BootstrapInfo
    from dynamo_worker_sglang.sampling import Translated

_ROOMS: Final = 2**63
_PORTS: Final = 2**16


class Role(disaggregation.Role):
    """The phase of each request that this worker runs.

    :ivar bootstrap: host and port of the bootstrap server of a prefill worker.
    """

    def __init__(self, mode: str, bootstrap: tuple[str, int]) -> None:
        """Take the role.

        :param mode: value of SGLang's ``--disaggregation-mode``.
        :param bootstrap: host and port of this worker's bootstrap server, which a prefill worker has.
        """
        super().__init__("aggregated" if mode == "null" else mode)
        self.bootstrap = bootstrap if mode == "prefill" else None
        self._port = bootstrap[1]

    def prepare(self, request: Mapping[str, Any], translated: Translated) -> None:
        """Tell SGLang where the two workers meet; a prefill worker also tells the decode worker.

        :raises InvalidRequestError: the request cannot be disaggregated.
        """
        if self.mode == "aggregated":
            return
        if translated.n > 1:
            raise InvalidRequestError("sampling_options.n: prefill and decode workers make only one answer")
        if self.bypasses_prefill(request):
            raise InvalidRequestError("a decode worker with SGLang cannot prefill by itself")
        given = dict(section(request, "bootstrap_info"))
        if self.mode == "decode":
            meeting = given or dict(section(request, "prefill_result", "disaggregated_params"))
            missing = [name for name in _MEETING if meeting.get(name) is None]
            if missing:
                raise InvalidRequestError(f"bootstrap_info: a decode worker needs {', '.join(missing)}")
        else:
            host, port = self.bootstrap or ("", 0)
            own = {"bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": random.randrange(_ROOMS)}
            meeting = {name: default if given.get(name) is None else given[name] for name, default in own.items()}
            translated.sampling["max_new_tokens"] = 1
            translated.sampling.pop("min_new_tokens", None)
        meeting = {name: read(f"bootstrap_info.{name}", meeting[name]) for name, read in _MEETING.items()}
        translated.options.update(meeting)
        if self.mode == "prefill" and not is_canary(request):
            translated.meeting = meeting

    def with_prefill_usage(self, request: Mapping[str, Any], send: Send) -> Send:  # noqa: ARG002 - part of the protocol
        """Return ``send``: SGLang hands the prefill worker's count of cached tokens over with the KV cache.

        The router cannot: it sends a request on before the prefill is complete.
        """
        return send

    def canary(self) -> BootstrapInfo | None:
        """Return the bootstrap address that serves a canary without another worker; None if none is needed."""
        if self.mode == "aggregated":
            return None
        from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST

        return {"bootstrap_host": FAKE_BOOTSTRAP_HOST, "bootstrap_port": self._port, "bootstrap_room": 0}


def _port(name: str, value: Any) -> int:
    if not 0 <= integer(name, value) < _PORTS:
        raise refusal(name, "a port", value)
    return int(value)


def _host(name: str, value: Any) -> str:
    limits.NAME_CHARACTERS.check(name, len(string(name, value)))
    return str(value)


def _room(name: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value < _ROOMS:  # the schedulers' table takes nothing else
        raise refusal(name, "a 63-bit integer", value)
    return value


#: The fields that say where two workers meet, with their readers: both schedulers rely on them.
_MEETING: Final[Mapping[str, Reader]] = {"bootstrap_host": _host, "bootstrap_port": _port, "bootstrap_room": _room}
