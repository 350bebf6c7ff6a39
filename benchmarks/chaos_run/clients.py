"""The clients: steady and bursty load of all kinds, whose answers are known in full."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import aiohttp

from chaos_run.accounts import Answered, Asked
from dynamo_worker.testing.client import Result, chat, stream

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from chaos_run.accounts import Accounts

#: Longest time of a request in seconds; after that it is lost.
_TIMEOUT: Final = 90.0
#: Seconds between bursts on average, and requests in one.
_BURST_PAUSE: Final = 30.0
_BURST: Final = 12
#: Most requests in flight: a fleet that hangs must not fill this machine. More are not sent.
_MOST_OPEN: Final = 300
#: Times that a client tries another frontend after a refused connection, and the pause in seconds.
_TRIES: Final = 40
_TRY_PAUSE: Final = 0.25


@dataclass(frozen=True)
class Kind:
    """A kind of client.

    :param name: what the tables call it.
    :param share: of all requests.
    :param tokens: fewest and most.
    :param prompt: characters of its prompt.
    :param pause: seconds between two reads.
    :param cancels: whether it goes away in the middle.
    :param refusable: whether it must be refused.
    """

    name: str
    share: float
    tokens: tuple[int, int]
    prompt: tuple[int, int] = (20, 200)
    pause: float = 0.0
    cancels: bool = False
    refusable: bool = False


KINDS: Final = (
    Kind("short", 0.62, (1, 40)),
    Kind("long", 0.16, (150, 400)),
    Kind("slow", 0.04, (60, 120), pause=0.03),
    Kind("cancelling", 0.15, (100, 400), cancels=True),
    Kind("huge", 0.02, (20, 60), prompt=(30_000, 100_000)),
    Kind("too long", 0.01, (10, 20), prompt=(140_000, 200_000), refusable=True),
)

#: Those of a model with a context of 2048 tokens.
SMALL_KINDS: Final = tuple(
    {
        "huge": replace(kind, prompt=(1000, 1500)),
        "too long": replace(kind, prompt=(3000, 5000)),
    }.get(kind.name, kind)
    for kind in KINDS
)


@dataclass(frozen=True)
class Model:
    """A model that clients ask for.

    :param name: of the model.
    :param share: of all requests.
    :param answer: returns the whole answer to a prompt, for a number of tokens; None if that cannot be known.
    :param kinds: of clients that it has.
    """

    name: str
    share: float
    answer: Callable[[str, int], str] | None
    kinds: Sequence[Kind] = KINDS


def echo(prompt: str, tokens: int) -> str:
    """Return what the echo engine answers: the prompt, over and over."""
    return "".join(itertools.islice(itertools.cycle(prompt), tokens))


class Clients:
    """Clients that send requests in the background until they are stopped.

    :param urls: returns the frontends by name, as a load balancer knows them.
    :param models: that clients ask for.
    :param rate: requests per second, bursts not counted.
    """

    def __init__(
        self,
        accounts: Accounts,
        urls: Callable[[], Mapping[str, str]],
        models: Sequence[Model],
        rate: float,
        seed: int,
    ) -> None:
        self._accounts = accounts
        self._urls = urls
        self._models = models
        self._rate = rate
        self._rng = random.Random(f"{seed}/clients")
        self._over = threading.Event()
        self.retried = 0
        self.not_sent = 0
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="clients", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, timeout: float = _TIMEOUT + 5.0) -> bool:
        """Send no more requests, and wait for those in flight; return whether all have ended."""
        self._over.set()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    async def _run(self) -> None:
        tasks: set[asyncio.Task[None]] = set()
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT)
        # A connection for each request: one that is kept would hide that a frontend takes no more.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            due = time.monotonic()
            burst = due + self._rng.expovariate(1.0 / _BURST_PAUSE)
            while not self._over.is_set():
                due += self._rng.expovariate(self._rate)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                count = 1
                if time.monotonic() > burst:
                    burst = time.monotonic() + self._rng.expovariate(1.0 / _BURST_PAUSE)
                    count = _BURST
                for _ in range(count):
                    if len(tasks) >= _MOST_OPEN:
                        self.not_sent += 1
                        continue
                    task = asyncio.create_task(self._ask(session, *self._draw()))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
            if tasks:
                await asyncio.wait(tasks)

    def _draw(self) -> tuple[Model, Kind, str, int, float]:
        rng = self._rng
        (model,) = rng.choices(self._models, [model.share for model in self._models])
        (kind,) = rng.choices(model.kinds, [kind.share for kind in model.kinds])
        tokens = rng.randint(*kind.tokens)
        length = rng.randint(*kind.prompt)
        # Each prompt differs, so that an answer that belongs to another one is seen.
        word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=min(length, 61)))
        return model, kind, (word * (length // len(word) + 1))[:length], tokens, rng.uniform(0.2, 4.0)

    async def _ask(
        self, session: aiohttp.ClientSession, model: Model, kind: Kind, prompt: str, tokens: int, leaves: float
    ) -> None:
        self._accounts.asked()
        body = chat(model.name, prompt, tokens)
        began, expected = time.monotonic(), model.answer(prompt, tokens) if model.answer else None
        frontend, result, cancelled = "", Result(), False
        for attempt in range(_TRIES):
            urls = self._urls()
            others = [name for name in urls if name != frontend] or list(urls)
            frontend, result = self._rng.choice(others), Result()
            stays = leaves if kind.cancels else 0.0
            cancelled = await self._once(session, urls[frontend], body, result, kind.pause, stays)
            # What a load balancer does: nobody has taken the request yet.
            if cancelled or not (result.error or "").startswith("ClientConnectorError"):
                break
            self.retried += attempt == 0
            await asyncio.sleep(_TRY_PAUSE)
        asked = Asked(kind.name, model.name, frontend, expected, began, kind.refusable)
        answered = Answered(result.status, result.text, result.finish_reason, result.error, time.monotonic(), cancelled)
        self._accounts.answered(asked, answered)

    @staticmethod
    async def _once(
        session: aiohttp.ClientSession, url: str, body: dict[str, Any], result: Result, pause: float, leaves: float
    ) -> bool:
        """Send a request; return whether its client has gone away before its end.

        :param leaves: seconds after which it goes away; 0: it stays.
        """
        asking = stream(session, f"{url}/v1/chat/completions", body, result, pause)
        if not leaves:
            await asking
            return False
        task = asyncio.create_task(asking)
        done, _ = await asyncio.wait({task}, timeout=leaves)
        if done:
            return False
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return True
