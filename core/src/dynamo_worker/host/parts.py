"""The parts of a worker: the start builds them, the shutdown releases those that exist."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynamo_worker.engine import Engine, EngineInfo
    from dynamo_worker.host.config.settings import WorkerSettings
    from dynamo_worker.host.discovery.registration import Registration
    from dynamo_worker.host.discovery.runtime import Runtime
    from dynamo_worker.host.frontend.embedded_frontend import EmbeddedFrontend
    from dynamo_worker.host.monitors.monitor_tasks import MonitorTasks
    from dynamo_worker.host.monitors.process_watch import ProcessWatch
    from dynamo_worker.host.requested_drain import RequestedDrain
    from dynamo_worker.host.requests.egress import Egress
    from dynamo_worker.host.requests.serving import RequestRegistry
    from dynamo_worker.host.status.metrics import WorkerMetrics
    from dynamo_worker.host.status.status_server import StatusServer
    from dynamo_worker.supervisor.run_directory import RunDirectory


@dataclass
class WorkerParts:
    """The parts of one worker; None stands for a part that does not exist, or not yet.

    :ivar requests: the requests in flight.
    :ivar egress: sends chunks to clients.
    :ivar processes: watches the engine's processes.
    :ivar monitors: the monitors that run while the worker serves.
    :ivar status: answers probes and control routes.
    :ivar own_directory: the private directory, if this process created it and must remove it.
    :ivar frontend: the frontend process beside the worker.
    :ivar runtime: the connection to discovery and the request plane.
    :ivar engine: the engine, started or not.
    :ivar requested_drain: takes the worker out of service and back, as its operator asks.
    """

    requests: RequestRegistry
    egress: Egress
    metrics: WorkerMetrics
    processes: ProcessWatch
    monitors: MonitorTasks
    status: StatusServer | None = None
    own_directory: RunDirectory | None = None
    frontend: EmbeddedFrontend | None = None
    runtime: Runtime | None = None
    engine: Engine | None = None
    requested_drain: RequestedDrain | None = None


@dataclass(frozen=True)
class ReadyWorker:
    """The result of a successful start.

    :param engine: the started engine.
    :param info: the registered information: the engine's, completed by the worker's flags.
    :param registration: keeps the worker's entries in discovery; None if this kind of discovery needs no watching.
    :param settings: the settings in force, adapted to the engine.
    """

    engine: Engine
    info: EngineInfo
    registration: Registration | None
    settings: WorkerSettings
