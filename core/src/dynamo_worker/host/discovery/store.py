"""What a discovery backend's storage must offer so that a worker's entries can be kept in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection

#: Where all backends keep the entries of endpoints.
INSTANCES = "v1/instances/"


class DiscoveryAwayError(OSError):
    """The discovery server does not answer. What it knows of the worker may well be right."""


class Store(Protocol):
    """A discovery backend's storage. Every method may block and raise OSError, and only one runs at a time."""

    @property
    def interval(self) -> float:
        """Seconds until the next check."""

    @property
    def count(self) -> int:
        """The number of expected entries."""

    def adopt(self, lost: Collection[str]) -> None:
        """Expect the entries that exist now, and those that were ``lost``."""

    def missing(self) -> list[str]:
        """Return the expected entries that do not exist.

        :raises DiscoveryAwayError: the server does not answer.
        """

    def restore(self, names: Collection[str]) -> None:
        """Write entries again as they were."""

    def endpoint(self, name: str) -> str | None:
        """Return the endpoint ``namespace/component/name`` that an entry stands for; None for other entries."""

    def cards(self) -> tuple[list[bytes], list[bytes]]:
        """Return this worker's entries with model cards, and those of some other workers of the same endpoints.

        :raises OSError: they cannot be read.
        """

    def close(self) -> None:
        """Restore nothing from now on, not even when a hanging call continues."""

    def release(self) -> None:
        """Remove the entries that the runtime does not remove by itself; called once it has shut down."""
