"""The command line of `dynamo-worker top`."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
from collections import Counter
from typing import TYPE_CHECKING, Final

from dynamo_worker.address import LOOPBACK, Address
from dynamo_worker.cli import output
from dynamo_worker.cli.top.screen import LiveScreen, is_terminal, print_json, print_text
from dynamo_worker.cli.top.table import ORDERS
from dynamo_worker.cli.top.watch import Watch
from dynamo_worker.errors import ServerUnreachableError, UsageError, WorkerError
from dynamo_worker.exit_codes import SIGNAL_BASE, ExitCode
from dynamo_worker.host.config.option_types import Number
from dynamo_worker.host.config.options import BY_NAME
from dynamo_worker.host.discovery.fleet import FoundWorker, workers
from dynamo_worker.host.discovery.fleet_reader import MOST_ENTRIES, FleetReader
from dynamo_worker.host.open_files import raise_limit

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import NoReturn

DESCRIPTION: Final = """\
Shows the workers of a namespace, live: their states, the phases of drains, requests in flight, response chunks per
second (engines put one token or several into a chunk), the delay of the event loop, readiness, how long the start
took, the age, and restarts that happen meanwhile. Workers come from discovery, and the figures from their status
servers, which must have a port (--system-port). Nothing is changed anywhere."""

EPILOG: Final = """\
examples:
  dynamo-worker top                                      the workers of DYN_NAMESPACE, as discovery is set for workers
  dynamo-worker top --discovery-backend file             of workers on this machine that share a directory
  dynamo-worker top --namespace 'prod*' --sort state     all generations of a rollout, those in trouble first
  dynamo-worker top localhost:9090 10.0.0.8:9090         these two, without discovery
  dynamo-worker top --json | jq -c '.workers[] | select(.ready == false)'
  kubectl exec POD -- dynamo-worker top --once           in a pod, where discovery is known

states:
  SERVING, DRAINING …    what the worker is doing
  leaving … resuming     the phase of a drain on request, while it serves
  no answer              it is in discovery, and its status server says nothing; the note says why
  gone                   it has left discovery: it has stopped, or was withdrawn. Shown for a minute

exit codes:
  0      Ctrl-C, or --once
  1      with --once: there is no worker
  2      an argument is invalid
  4      discovery cannot be reached"""

#: Seconds between the two looks of ``--once``.
ONCE_SECONDS: Final = 1.0
_INTERVAL: Final = Number(0.2, 3600, "seconds")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        raise UsageError(message, hint="`dynamo-worker top --help` shows how")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    result = _Parser(
        prog="dynamo-worker top",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument(
        "addresses",
        nargs="*",
        type=_address,
        metavar="HOST:PORT",
        help="address of a worker's status server (--system-port), for workers that discovery does not know; a port "
        "alone is on this machine. Discovery is not read then",
    )
    result.add_argument(
        "--namespace",
        metavar="NAME",
        help="namespace of the workers; with a * at its end, all that begin like this [default: that of workers: "
        "DYN_NAMESPACE, otherwise dynamo; with DYN_NAMESPACE_WORKER_SUFFIX all generations]",
    )
    backend, path = BY_NAME["discovery_backend"], BY_NAME["discovery_path"]
    result.add_argument(
        backend.flag,
        choices=("file", "etcd", "kubernetes"),
        help=f"where workers register [default: etcd] [env: {backend.env}]",
    )
    result.add_argument(path.flag, metavar=path.metavar, help=f"{path.help} [default: Dynamo's own] [env: {path.env}]")
    result.add_argument("--sort", choices=tuple(ORDERS), default="load", help="order of the workers [default: load]")
    result.add_argument(
        "--interval", type=_interval, default=2.0, metavar="SECONDS", help="time between refreshes [default: 2]"
    )
    result.add_argument("--once", action="store_true", help="show the workers once; takes a second, for the rates")
    result.add_argument("--json", action="store_true", help="print one JSON object in one line with each refresh")
    return result


def _address(text: str) -> Address:
    try:
        return Address.parse(text, f"{LOOPBACK}:")
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}, got {text!r}") from None


def _interval(text: str) -> float:
    try:
        return _INTERVAL.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}, got {text!r}") from None


class _Cluster:
    """What discovery knows of the workers in some namespaces."""

    def __init__(self, reader: FleetReader, namespace: str) -> None:
        """Read workers in a namespace, or in all that begin like it if a ``*`` ends it."""
        self.place = reader.place
        self.namespace = namespace
        self.incomplete = False
        self._reader = reader

    def discover(self) -> dict[str, FoundWorker]:
        """Return the workers by their ids. Blocks.

        :raises OSError: discovery does not answer.
        """
        prefix = self.namespace[:-1] if self.namespace.endswith("*") else f"{self.namespace}/"
        entries = self._reader.read(prefix)
        self.incomplete = len(entries) == MOST_ENTRIES
        return workers(entries)

    def nothing(self) -> str:
        """Return where there is no worker, and where there are some. Blocks.

        :raises OSError: discovery does not answer.
        """
        others = Counter(worker.namespace for worker in workers(self._reader.read("")).values())
        listed = ", ".join(f"{name} ({count})" for name, count in others.most_common(10))
        known = f"the namespaces with workers are {listed}" if listed else "nor in any other namespace"
        return f"no worker in namespace {self.namespace} ({self.place}); {known}"


class _Listed:
    """Workers whose addresses are given."""

    place = namespace = None
    incomplete = False

    def __init__(self, addresses: Sequence[Address]) -> None:
        self._found = {str(address): FoundWorker("", "", "", status=address) for address in addresses}

    def discover(self) -> Mapping[str, FoundWorker]:
        """Return them, with their addresses as names."""
        return self._found

    def nothing(self) -> str:
        """Return that none answers, which cannot be: they are listed even so."""
        return "no worker"


def main(argv: Sequence[str]) -> int:
    """Show workers until Ctrl-C.

    :raises UsageError: an argument is invalid.
    :raises ServerUnreachableError: discovery does not answer.
    :raises WorkerError: with ``--once``, there is no worker.
    """
    arguments = parser().parse_args(argv)
    raise_limit()  # each worker is a connection
    source: _Cluster | _Listed
    if arguments.addresses:
        for name in ("namespace", "discovery_backend", "discovery_path"):
            if getattr(arguments, name) is not None:
                raise UsageError(f"{BY_NAME[name].flag} has no effect on addresses that are given")
        source = _Listed([address.resolved("HOST:PORT") for address in arguments.addresses])
    else:
        backend = arguments.discovery_backend or os.environ.get(BY_NAME["discovery_backend"].env) or "etcd"
        if backend not in ("file", "etcd", "kubernetes"):
            raise UsageError(f"discovery {backend!r} cannot be read from outside; expected file, etcd or kubernetes")
        source = _Cluster(FleetReader(backend, arguments.discovery_path), arguments.namespace or _own_namespace())
    return asyncio.run(_Session(source, arguments).run())


def _own_namespace() -> str:
    namespace = BY_NAME["namespace"]
    name = os.environ.get(namespace.env) or str(namespace.default)
    suffix = os.environ.get(BY_NAME["namespace_worker_suffix"].env)
    return f"{name.removesuffix(f'-{suffix}')}*" if suffix else name


class _Session:
    """One run of the command."""

    def __init__(self, source: _Cluster | _Listed, arguments: argparse.Namespace) -> None:
        self._source = source
        self._arguments = arguments
        self._watch = Watch(source.discover)
        self._stopped = asyncio.Event()
        self._resized = asyncio.Event()
        self._signal = 0
        self._screen: LiveScreen | None = None
        self._nothing: str | None = None

    async def run(self) -> int:
        """Refresh until a signal; return the exit code.

        :raises WorkerError: there is nothing to show.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._stop, number)
        loop.add_signal_handler(signal.SIGWINCH, self._resized.set)
        stopping = asyncio.ensure_future(self._stopped.wait())
        refreshing = asyncio.ensure_future(self._once() if self._arguments.once else self._live())
        try:
            await asyncio.wait({stopping, refreshing}, return_when=asyncio.FIRST_COMPLETED)
            if refreshing.done():
                refreshing.result()
        finally:
            for task in (stopping, refreshing):
                task.cancel()
            if self._screen is not None:
                self._screen.close()
        return ExitCode.STOPPED if self._signal in (0, signal.SIGINT) else SIGNAL_BASE + self._signal

    def _stop(self, number: signal.Signals) -> None:
        self._signal = number
        self._stopped.set()

    async def _once(self) -> None:
        await self._refresh()
        if not self._watch.workers:
            raise WorkerError(self._nothing or "no worker")
        await asyncio.sleep(ONCE_SECONDS)
        await self._refresh()
        self._show()

    async def _live(self) -> None:
        loop = asyncio.get_running_loop()
        console = output.console(highlight=False, markup=False)
        while True:
            started = loop.time()
            await self._refresh()
            if self._screen is None and not self._arguments.json and is_terminal(console):
                self._screen = LiveScreen(console)
            self._show()
            while (left := started + self._arguments.interval - loop.time()) > 0:
                self._resized.clear()
                try:
                    await asyncio.wait_for(self._resized.wait(), left)
                except (asyncio.TimeoutError, TimeoutError):
                    break
                self._show()

    async def _refresh(self) -> None:
        """Look at everything once.

        :raises ServerUnreachableError: discovery has never answered, and does not now.
        """
        watch = self._watch
        await watch.refresh(self._arguments.interval)
        if not watch.read:
            raise ServerUnreachableError(
                f"discovery cannot be read ({self._source.place}): {watch.trouble}",
                hint="--discovery-backend and its variables (ETCD_ENDPOINTS, DYN_FILE_KV) say where workers register; "
                "HOST:PORT of status servers does without discovery",
            )
        self._nothing = None
        if not watch.workers:
            try:
                self._nothing = await asyncio.wait_for(asyncio.shield(self._ask_for_others()), 10)
            except (OSError, asyncio.TimeoutError, TimeoutError):
                self._nothing = f"no worker in namespace {self._source.namespace} ({self._source.place})"

    def _ask_for_others(self) -> asyncio.Future[str]:
        from dynamo_worker.cli.top.watch import in_thread

        return in_thread(self._source.nothing)

    def _show(self) -> None:
        watch, source = self._watch, self._source
        ordered = sorted(watch.workers.values(), key=ORDERS[self._arguments.sort])
        trouble = self._nothing
        if watch.trouble is not None:
            trouble = f"discovery cannot be read, so workers may be missing: {watch.trouble}"
        elif source.incomplete:
            trouble = f"discovery has more than {MOST_ENTRIES} entries, so workers are missing: choose a --namespace"
        if self._arguments.json:
            print_json(source.namespace, ordered, trouble)
        elif self._screen is not None:
            title = (
                "dynamo-worker top" if source.namespace is None else f"namespace {source.namespace} ({source.place})"
            )
            self._screen.show(title, ordered, trouble)
        else:
            print_text(ordered, trouble)
