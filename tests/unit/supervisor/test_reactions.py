"""What is done in each phase at each event, with everything that acts replaced by a record of what was asked of it."""

from __future__ import annotations

import signal
import time
from types import SimpleNamespace

import pytest

from dynamo_worker.supervisor.escalation import Escalation, Event, KillCause, Phase
from dynamo_worker.supervisor.reactions import Reactions
from dynamo_worker.supervisor.worker_status import WorkerStatus

TERM, INT, QUIT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1

#: How many stop signals lead to a phase, and whether the worker has ended.
ROUTES = {
    Phase.RUNNING: (0, False),
    Phase.STOPPING: (1, False),
    Phase.FORCING: (2, False),
    Phase.KILLING: (3, False),
    Phase.ENDED: (0, True),
    Phase.CLEANING: (1, True),
    Phase.LEAVING: (3, True),
}

#: What is done: words that `World.done` holds, in this order.
TABLE = {
    Phase.RUNNING: {
        Event.STOP: ["told 1"],
        Event.QUIT: ["dump", "told 2"],
        Event.DUMP: ["dump"],
        Event.UNRESPONSIVE: ["withdraw", "dump"],
        Event.TIME_UP: ["kill deadline"],
    },
    Phase.STOPPING: {
        Event.STOP: ["told 2"],
        Event.QUIT: ["dump", "told 2"],
        Event.DUMP: ["dump"],
        Event.UNRESPONSIVE: ["withdraw", "dump"],
        Event.TIME_UP: ["kill deadline"],
    },
    Phase.FORCING: {
        Event.STOP: ["kill forced"],
        Event.QUIT: ["dump", "kill forced"],
        Event.DUMP: ["dump"],
        Event.UNRESPONSIVE: ["withdraw", "dump"],
        Event.TIME_UP: ["kill forced"],
    },
    Phase.KILLING: {
        Event.STOP: ["kill forced"],
        Event.QUIT: ["dump", "kill forced"],
        Event.DUMP: ["dump"],
        Event.UNRESPONSIVE: [],
        Event.TIME_UP: [],
    },
    Phase.ENDED: {
        Event.STOP: ["deadlines"],
        Event.QUIT: ["deadlines"],
        Event.DUMP: ["dump"],
        Event.UNRESPONSIVE: [],
        Event.TIME_UP: [],
    },
    Phase.CLEANING: {
        Event.STOP: ["deadlines hurried"],
        Event.QUIT: ["deadlines hurried"],
        Event.DUMP: ["dump"],
        Event.UNRESPONSIVE: [],
        Event.TIME_UP: [],
    },
    Phase.LEAVING: {
        Event.STOP: ["deadlines hurried"],
        Event.QUIT: ["deadlines hurried"],
        Event.DUMP: ["dump"],
        Event.UNRESPONSIVE: [],
        Event.TIME_UP: [],
    },
}


class World:
    """Everything that reactions act on, as a record."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.logged: list[tuple[str, dict]] = []
        self.listens = True
        self.handles_usr1 = True
        self.escalation = Escalation()
        self.status = WorkerStatus(time.monotonic(), 30.0, "")
        self.status.take({"type": "state", "state": "SERVING"}, time.monotonic())
        self.worker = SimpleNamespace(
            process=(1, 2), gone_at=None, alive=True, kill_cause=None, ended=False,
            kill=self.kill, signal=self.signal, catches=lambda number: self.handles_usr1,
        )  # fmt: skip
        self.control = SimpleNamespace(closed=False, closed_at=None, stop=self.tell)
        self.cleaning = SimpleNamespace(taken_over=False, update_deadlines=self.update_deadlines)
        self.systemd = SimpleNamespace(due=lambda state: None, stopping=self.stopping, tick=self.tick)
        self.extension = 0.0
        self.responsive: bool | None = None
        self.reactions = Reactions(
            self.worker, self.status, self.escalation,
            control=self.control,
            guardian=SimpleNamespace(channel=SimpleNamespace(send=self.done.append)),
            cleaning=self.cleaning,
            systemd=self.systemd,
            log=SimpleNamespace(info=self.log, warning=self.log, error=self.log),
        )  # fmt: skip

    def log(self, message, **fields):
        self.logged.append((message, fields))

    def kill(self, cause):
        self.done.append(f"kill {cause}")
        self.worker.kill_cause = cause

    def signal(self, number):
        self.done.append("dump" if number == USR1 else signal.Signals(number).name)
        return True

    def tell(self, level, name, at):
        self.done.append(f"told {level}")
        return self.listens

    def stopping(self, name, seconds):
        self.extension = seconds

    def tick(self, now, state, *, responsive):
        self.responsive = responsive

    def update_deadlines(self):
        self.done.append("deadlines hurried" if self.escalation.hurried else "deadlines")

    def come_to(self, phase):
        count, ended = ROUTES[phase]
        for _ in range(count):
            self.escalation.escalate(TERM, time.monotonic())
        self.worker.ended = ended
        assert self.escalation.phase(ended=ended) is phase

    def happen(self, event):
        """Bring an event about, as late as it takes."""
        if event is Event.UNRESPONSIVE:
            self.status.heartbeat_timeout = 1.0
            self.status.last_beat -= 60.0
            self.reactions.act_on_time()
        elif event is Event.TIME_UP:
            self.status.deadline = 0.0
            self.escalation.forced_at -= 60.0
            if self.escalation.level >= 3:
                self.worker.kill_cause = KillCause.FORCED  # the third signal killed it at once
            self.reactions.act_on_time()
        else:
            self.reactions.on_signal({Event.STOP: TERM, Event.QUIT: QUIT, Event.DUMP: USR1}[event])


@pytest.fixture
def world():
    return World()


def test_the_table_is_total():
    """Every event has an action in every phase, and only there."""
    assert Reactions._ACTIONS.keys() == {(phase, event) for phase in Phase for event in Event}
    assert {(phase, event) for phase, row in TABLE.items() for event in row} == Reactions._ACTIONS.keys()


@pytest.mark.parametrize("event", Event)
@pytest.mark.parametrize("phase", Phase)
def test_what_is_done(world, phase, event):
    world.come_to(phase)
    if phase is Phase.KILLING and event is Event.UNRESPONSIVE:
        world.worker.kill_cause = KillCause.FORCED
    world.happen(event)
    assert world.done == TABLE[phase][event]


@pytest.mark.parametrize(
    ("phase", "level", "then"),
    [
        (Phase.RUNNING, 1, "another one forces the stop within 2 s"),
        (Phase.STOPPING, 2, "another one kills at once"),
        (Phase.FORCING, 3, "killed now"),
        (Phase.ENDED, 1, "cleaning up; another one leaves at once"),
        (Phase.CLEANING, 1, "leaving at once"),
        (Phase.LEAVING, 3, "leaving at once"),
    ],
)
def test_every_signal_logs_the_effect_of_the_next(world, phase, level, then):
    world.come_to(phase)
    world.reactions.on_signal(INT)
    (fields,) = [fields for message, fields in world.logged if message == "Received shutdown signal"]
    assert (fields["signal"], fields["stop_level"], fields["next"]) == ("SIGINT", level, then)


def test_a_stop_logs_the_deadline(world):
    world.reactions.on_signal(TERM)
    assert world.logged[0][1]["deadline_s"] == pytest.approx(28.0, abs=0.5)
    assert world.extension == pytest.approx(33.0, abs=0.5), "systemd waits for that, and for the cleaning"


def test_signals_that_come_together_count_once(world):
    for number in (TERM, signal.SIGHUP, TERM):
        world.reactions.on_signal(number)
    assert world.done == ["told 1"]


def test_every_dump_request_counts(world):
    world.reactions.on_signal(USR1)
    world.reactions.on_signal(TERM)
    world.reactions.on_signal(USR1)
    assert world.done == ["dump", "told 1", "dump"]


def test_a_worker_that_reads_nothing_is_signalled(world):
    world.listens = False
    world.reactions.on_signal(INT)
    assert world.done == ["told 1", "SIGTERM"]


def test_no_signal_goes_to_a_worker_that_it_would_end(world):
    world.handles_usr1 = False
    world.reactions.on_signal(USR1)
    assert world.done == []
    assert world.logged[-1][0] == "No stack dump: the worker does not handle SIGUSR1"


class TestUnresponsive:
    def test_it_is_killed_once_it_has_had_time_to_dump(self, world):
        world.happen(Event.UNRESPONSIVE)
        assert world.reactions.stuck_for == pytest.approx(60.0, abs=0.5)
        assert world.responsive is False, "systemd gets no sign of life"
        due = world.reactions.next_timer()
        assert due == pytest.approx(time.monotonic() + 1.0, abs=0.5)
        world.reactions._stuck_at -= 2.0
        world.reactions.act_on_time()
        assert world.done == ["withdraw", "dump", "kill stuck"]

    @pytest.mark.parametrize("silent", ["closed", "killed", "ended"])
    def test_silence_is_excused_when_no_heartbeat_is_possible(self, world, silent):
        world.control.closed = silent == "closed"
        world.worker.kill_cause = KillCause.DEADLINE if silent == "killed" else None
        world.worker.ended = silent == "ended"
        world.happen(Event.UNRESPONSIVE)
        assert world.done == []
        assert world.reactions.next_timer() is None


class TestClosedSocket:
    MESSAGE = "Worker closed its control socket; its state and heartbeat are unknown"

    def test_a_living_worker_is_reported_once(self, world):
        world.control.closed_at = time.monotonic()
        world.reactions.act_on_time()
        assert world.logged == [], "it may be about to end"
        world.control.closed_at -= 2.0
        for _ in range(2):
            world.reactions.act_on_time()
        assert [message for message, _ in world.logged] == [self.MESSAGE]
        assert world.reactions.next_timer() is None

    def test_a_dead_worker_is_not_reported(self, world):
        world.control.closed_at = time.monotonic() - 2.0
        world.worker.alive = False
        world.reactions.act_on_time()
        assert world.logged == []
