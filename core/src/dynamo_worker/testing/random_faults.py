"""Random faults: each round draws a moment, one or two victims, signals, and perhaps a resource that runs short.

The fault table covers known faults; this test looks for unknown ones. A round depends only on the seed and its number,
and can be repeated by itself::

    DYNAMO_WORKER_TEST_SEED=4711 DYNAMO_WORKER_TEST_ROUND=17 pytest tests/faults/test_random.py

After each round, everything that belongs to the worker must be gone, its exit code must be one that
:func:`~dynamo_worker.testing.random_draws.allowed` returns, its log must give a reason, and no stream that another
worker could finish may be lost.
"""

from __future__ import annotations

import os
import queue
import random
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING

from dynamo_worker.testing.random_draws import draw
from dynamo_worker.testing.random_place import Place
from dynamo_worker.testing.random_round import Round

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import pytest

    from dynamo_worker.testing.leftovers import Leftovers
    from dynamo_worker.testing.subject import Subject


class RandomFaults:
    """The test. It uses the same subject as the fault table; streams should last a second or two."""

    #: Number of rounds; ``DYNAMO_WORKER_TEST_ROUNDS`` overrides it.
    ROUNDS = 20
    #: Number of rounds that run in parallel, each in a separate cluster.
    PLACES = 1
    #: Seed of all rounds; None draws a new one each time. ``DYNAMO_WORKER_TEST_SEED`` overrides it.
    SEED: int | None = None
    #: How often failed rounds are repeated; the test fails only if a round fails every time. Keeps rare failures from
    #: blocking unrelated changes. ``DYNAMO_WORKER_TEST_REPEATS`` overrides it.
    REPEATS = 0

    def test_random_faults(
        self, subject: Subject, tmp_path: Path, no_leftovers: Leftovers, capsys: pytest.CaptureFixture[str]
    ) -> None:
        environment = os.environ.get
        drawn = random.SystemRandom().randrange(10**6) if self.SEED is None else self.SEED
        seed = int(environment("DYNAMO_WORKER_TEST_SEED") or drawn)
        repeats = int(environment("DYNAMO_WORKER_TEST_REPEATS") or self.REPEATS)
        only = environment("DYNAMO_WORKER_TEST_ROUND")
        rounds = int(environment("DYNAMO_WORKER_TEST_ROUNDS") or self.ROUNDS)
        numbers = [int(only)] if only else list(range(rounds))

        def tell(text: str) -> None:
            with capsys.disabled():
                print(text, flush=True)

        tell(f"\n{len(numbers)} rounds, DYNAMO_WORKER_TEST_SEED={seed}")
        places: queue.Queue[Place] = queue.Queue()
        made = [Place.make(tmp_path / str(n), no_leftovers, subject) for n in range(min(self.PLACES, len(numbers)))]
        for place in made:
            place.segments = made[0].segments
            places.put(place)

        def play(number: int) -> Round:
            place = places.get()
            try:
                one = Round(place, draw(seed, number, tuple(subject.processes), subject.stall_timeout))
                one.run()
                return one
            finally:
                places.put(place)

        failed = self._play(play, numbers, tell)
        for again in range(repeats):
            if failed:
                tell(f"Repeating failed rounds, {again + 1} of {repeats}:\n" + "\n".join(failed.values()))
                failed = self._play(play, sorted(failed), tell)
        for place in made:
            place.close()
        heading = f"{len(failed)} of {len(numbers)} rounds failed, seed {seed}:"
        assert not failed, "\n".join([heading, *failed.values()])

    def _play(
        self, play: Callable[[int], Round], numbers: Sequence[int], tell: Callable[[str], None]
    ) -> dict[int, str]:
        """Run the rounds, print their results, and return descriptions of the failed ones by number."""
        began = time.monotonic()
        failed = {}
        with ThreadPoolExecutor(self.PLACES) as pool:
            running = [pool.submit(play, number) for number in numbers]
            for done, future in enumerate(as_completed(running), 1):
                one = future.result()
                verdict = f"exit {one.code}" if not one.problems else f"exit {one.code}  FAILED: {one.problems}"
                text = f"round {one.drawn.number:3} ({one.seconds:4.1f} s): {one.drawn} -> {verdict}"
                tell(f"[{done}/{len(numbers)}, {time.monotonic() - began:.0f} s] {text}")
                if one.problems:
                    failed[one.drawn.number] = f"{text}\n{one.log[-6000:]}"
        return failed
