"""The entries of a worker in Kubernetes: in the custom resource of its pod."""

from __future__ import annotations

import json
import random
import time
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.host.discovery.card_check import MOST_CARDS
from dynamo_worker.host.discovery.store import DiscoveryAwayError
from dynamo_worker.supervisor import kubernetes

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

#: Groups of entries without which no requests arrive.
_ENDPOINTS: Final = "endpoints"
_CARDS: Final = "model_cards"
#: Seconds between checks, soon after a start or a loss and at most: then 5000 workers ask 170 times a second.
_SHORTEST: Final = 2.0
_LONGEST: Final = 30.0
#: By which part of itself a time varies, so that a fleet does not ask at once.
_JITTER: Final = 0.25
#: Seconds to leave the API alone after it did not answer or refused; doubled with every further time.
_FIRST_REST: Final = 2.0
_LONGEST_REST: Final = 60.0
#: Seconds for the API to answer.
_TIMEOUT: Final = 5.0
#: What the API says to something that it will never accept, or that another has changed meanwhile. All other refusals
#: (no permission, a token that is not accepted, too many requests, unknown resources) may end without us.
_REJECTED: Final = (400, 409, 413, 415, 422)


class KubernetesStore:
    """All entries of one worker: those in the resource of its pod or container.

    The runtime writes the whole resource whenever something changes, and never looks at it again (measured on 1.6.1).
    """

    def __init__(self) -> None:
        self._data: dict[str, dict[str, Any]] = {}
        #: What the resource held when it was last read.
        self._current: dict[str, dict[str, Any]] = {}
        self._owners: list[Any] = []
        self._version: str | None = None
        self._closed = False
        self._pause = _SHORTEST
        self._rest = _FIRST_REST
        self._rests_until = -float("inf")
        self._trouble = ""

    @property
    def interval(self) -> float:
        """Seconds until the next check."""
        rest = self._rests_until - time.monotonic()
        return rest if rest > 0 else _varied(self._pause)

    @property
    def count(self) -> int:
        """The number of expected entries that requests depend on."""
        return len(_names(self._data))

    def adopt(self, lost: Collection[str]) -> None:
        """Expect the entries that exist now, and those that were ``lost``.

        :raises DiscoveryAwayError: the API does not answer, or refuses.
        """
        self._read()
        self._data = self._with(lost)
        self._pause = _SHORTEST

    def missing(self) -> list[str]:
        """Return the expected entries that do not exist.

        :raises DiscoveryAwayError: the API does not answer, or refuses.
        :raises OSError: the resource belongs to another pod.
        """
        self._read()
        there = _names(self._current)
        missing = [name for name in _names(self._data) if name not in there]
        if missing:
            self._pause = _SHORTEST
        else:
            self._data = self._current
            self._pause = min(2 * self._pause, _LONGEST)
        return missing

    def restore(self, names: Collection[str]) -> None:
        """Write entries again as they were, and with them all others of this worker.

        :raises DiscoveryAwayError: the API does not answer, or refuses.
        :raises OSError: it rejects what is written.
        """
        if self._closed:
            return
        metadata: dict[str, Any] = {"ownerReferences": self._owners}
        if self._version is not None:
            metadata["resourceVersion"] = self._version  # otherwise what the runtime has written since would be lost
        data = self._with(names)
        self._ask(lambda: kubernetes.apply(metadata, data, time.monotonic() + _TIMEOUT))

    def endpoint(self, name: str) -> str | None:
        """Return the endpoint ``namespace/component/name`` that an entry stands for; None for other entries."""
        group, _, key = name.partition("/")
        return key.rpartition("/")[0] if group == _ENDPOINTS else None

    def cards(self) -> tuple[list[bytes], list[bytes]]:
        """Return this worker's entries with model cards, and those of some other workers of the same endpoints."""
        own = self._data.get(_CARDS, {})
        endpoints = {_endpoint_of(key) for key in own}
        found = self._ask(lambda: kubernetes.sample(MOST_CARDS, time.monotonic() + _TIMEOUT))
        others = [
            card
            for each in found
            for key, card in _data_of(each).get(_CARDS, {}).items()
            if key not in own and _endpoint_of(key) in endpoints
        ]
        return [json.dumps(card).encode() for card in own.values()], [json.dumps(card).encode() for card in others]

    def close(self) -> None:
        """Restore nothing from now on, not even when a hanging call continues."""
        self._closed = True

    def release(self) -> None:
        """Do nothing: the supervisor empties the resource at the end."""

    def _read(self) -> None:
        """Read the resource.

        :raises OSError: it belongs to another pod of the same name.
        """
        found = self._ask(lambda: kubernetes.read(time.monotonic() + _TIMEOUT))
        metadata = {} if found is None else _part(found, "metadata")
        owners = metadata.get("ownerReferences") or []
        if found is not None and self._owners and owners != self._owners:
            raise OSError(f"the resource {kubernetes.resource()} belongs to another pod")
        self._owners = owners or self._owners
        self._version = metadata.get("resourceVersion")
        self._current = _data_of(found)

    def _with(self, names: Collection[str]) -> dict[str, dict[str, Any]]:
        """Return what the resource holds, with the expected entries ``names``.

        Announcements of events are not missed by themselves, because the runtime may remove them at any time; they come
        back with what else was lost.
        """
        merged = {group: dict(entries) for group, entries in self._current.items()}
        for group, entries in self._data.items():
            necessary = group in (_ENDPOINTS, _CARDS)
            for key, value in entries.items():
                if f"{group}/{key}" in names if necessary else names:
                    merged.setdefault(group, {}).setdefault(key, value)
        return {**{group: {} for group in self._data}, **merged}

    def _ask(self, function: Callable[[], Any]) -> Any:
        """Call the API, unless it is to be left alone.

        :raises DiscoveryAwayError: it does not answer, refuses for now, or is left alone.
        :raises OSError: it rejects what was sent.
        """
        if time.monotonic() < self._rests_until:
            raise DiscoveryAwayError(self._trouble)
        try:
            answer = function()
        except OSError as error:
            if isinstance(error, kubernetes.KubernetesError) and error.status in _REJECTED:
                raise
            status = f"HTTP status {error.status}: " if isinstance(error, kubernetes.KubernetesError) else ""
            self._trouble = f"the Kubernetes API at {kubernetes.address()}: {status}{error or type(error).__name__}"
            self._rests_until = time.monotonic() + _varied(self._rest)
            self._rest = min(2 * self._rest, _LONGEST_REST)
            raise DiscoveryAwayError(self._trouble) from error
        self._rest = _FIRST_REST
        return answer


def _names(data: dict[str, dict[str, Any]]) -> list[str]:
    """Return the names of the entries without which no requests arrive, ``GROUP/KEY``."""
    return [f"{group}/{key}" for group in (_ENDPOINTS, _CARDS) for key in data.get(group, ())]


def _data_of(resource: object) -> dict[str, dict[str, Any]]:
    """Return the entries in a custom resource by group and key; what has another form counts as missing."""
    data = _part(_part(resource, "spec"), "data")
    return {group: entries for group, entries in data.items() if isinstance(entries, dict)}


def _part(value: object, name: str) -> dict[str, Any]:
    part = value.get(name) if isinstance(value, dict) else None
    return part if isinstance(part, dict) else {}


def _endpoint_of(key: str) -> str:
    """Return the endpoint ``namespace/component/name`` that a model card belongs to."""
    return "/".join(key.split("/")[:3])


def _varied(seconds: float) -> float:
    return seconds * random.uniform(1 - _JITTER, 1 + _JITTER)
