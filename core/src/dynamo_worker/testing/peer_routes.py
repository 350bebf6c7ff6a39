"""The control routes of Dynamo's own workers: an engine's plugin has each one, unless it is refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from dynamo_worker.host.status.model_taints import ROUTE
from dynamo_worker.host.status.peer_routes import PEER_ROUTES

if TYPE_CHECKING:
    from collections.abc import Collection


class PeerRoutes:
    """The tests. A plugin's tests derive from it, and have a fixture ``operations``: the names of its routes."""

    #: The engine's name in the table of routes.
    WORKER: ClassVar[str]

    def test_each_route_that_is_not_refused_is_there(self, operations: Collection[str]) -> None:
        """The worker itself has the route of taints."""
        wanted = self._routes(refused=False) - {ROUTE.removeprefix("control/")}
        assert wanted
        assert wanted <= set(operations)

    def test_no_route_that_is_refused_is_there(self, operations: Collection[str]) -> None:
        """Otherwise its message would never be seen."""
        assert self._routes(refused=True).isdisjoint(operations)

    def _routes(self, *, refused: bool) -> set[str]:
        routes = [route for route in PEER_ROUTES if self.WORKER in route.workers]
        return {route.path.removeprefix("control/") for route in routes if bool(route.refused) == refused}
