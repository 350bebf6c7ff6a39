"""Memory that many share: whoever needs some waits for its turn until there is enough."""

from __future__ import annotations

import asyncio
import collections
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class NoRoomError(Exception):
    """There is not enough free memory, and who needs it must not wait: it holds some that others may wait for."""


class Budget:
    """A number of bytes, given out in the order of the questions.

    Who has a share waits for no second one of the same budget: otherwise two could wait for each other for ever.

    :ivar most: all of it.
    :ivar free: what nobody has.
    """

    def __init__(self, most: int) -> None:
        self.most = self.free = most
        self._waiting: collections.deque[tuple[int, asyncio.Future[None]]] = collections.deque()

    @contextlib.asynccontextmanager
    async def share(self, amount: int) -> AsyncIterator[Share]:
        """Wait for a share, which ends with the block.

        :param amount: at most :attr:`most`.
        """
        if self._waiting or amount > self.free:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((amount, turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._give_back(amount)  # it came just then
                else:
                    with contextlib.suppress(ValueError):  # it has had its turn, but was gone
                        self._waiting.remove((amount, turn))
                    self._give_back(0)  # this one may have been in the way
                raise
        else:
            self.free -= amount
        share = Share(self, amount)
        try:
            yield share
        finally:
            share.shrink(0)

    def _give_back(self, amount: int) -> None:
        self.free += amount
        while self._waiting and self._waiting[0][0] <= self.free:
            wanted, turn = self._waiting.popleft()
            if not turn.done():
                self.free -= wanted
                turn.set_result(None)


class Share:
    """What somebody has of a budget.

    :ivar amount: how much.
    """

    def __init__(self, budget: Budget, amount: int) -> None:
        self.amount = amount
        self._budget = budget

    def grow(self, amount: int) -> None:
        """Take ``amount`` bytes more.

        :raises NoRoomError: they are not free.
        """
        if amount > self._budget.free:
            raise NoRoomError
        self._budget.free -= amount
        self.amount += amount

    def shrink(self, amount: int) -> None:
        """Give back what is more than ``amount``."""
        surplus, self.amount = self.amount - amount, min(self.amount, amount)
        if surplus > 0:
            self._budget._give_back(surplus)  # noqa: SLF001 - its other half
