"""How our command lines judge the commands by which ai-dynamo/dynamo starts its own workers.

``python plugins/upstream_commands.py vllm``, in an environment with that engine, prints the table. The commands are in
``ENGINE/tests/data``; its README.md says where they come from.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, Final
from unittest import mock

import yaml

from dynamo_worker.cli import run
from dynamo_worker.errors import WorkerError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

#: What a worker does to its process before it reads the engine's flags.
_PREPARATIONS: Final = (
    *("dynamo_worker.cli.run.protect_multiprocessing", "dynamo_worker.cli.run.logs.setup"),
    *("dynamo_worker.cli.run.logs.quiet_runtime", "dynamo_worker.cli.run.open_files.raise_limit"),
    "dynamo_worker.host.plugins.facade.Plugins.prepare",
)


@dataclass(frozen=True)
class Command:
    """A script or manifest of upstream's.

    :ivar workers: the environment and the flags of each kind of worker that it starts.
    :ivar refused: what a refusal names, any of them; empty if our worker takes all of its workers.
    :ivar files: what those flags read, by name.
    """

    name: str
    workers: tuple[tuple[dict[str, str], tuple[str, ...]], ...]
    refused: tuple[str, ...]
    files: dict[str, Any]

    def refusals(self, engine: str) -> list[str]:
        """Return, for each worker that ours refuses, the message."""
        return [message for message in (self._judge(engine, *worker) for worker in self.workers) if message]

    def problem(self, refusals: list[str]) -> str:
        """Return what is wrong with the judgement, or nothing."""
        if not self.refused:
            return f"refused: {refusals[0]}" if refusals else ""
        if not refusals:
            return f"accepted, but {' or '.join(self.refused)} is not served"
        for message in refusals:
            if "unknown" in message or not any(name in message for name in self.refused):
                return f"does not name {' or '.join(self.refused)}: {message}"
            if "\n" in message.partition("\n  next: ")[0]:
                return f"more than one line: {message}"
        return ""

    def _judge(self, engine: str, environment: dict[str, str], flags: tuple[str, ...]) -> str:
        """Start a worker, up to the point at which it needs a model; return why it refuses, or nothing."""
        here = Path.cwd()
        with tempfile.TemporaryDirectory() as directory, mock.patch.dict(os.environ, environment):
            for name, content in self.files.items():
                text = yaml.safe_dump(content, sort_keys=False)
                (Path(directory) / name).write_text(_filled_in(text, directory))
            os.chdir(directory)
            try:
                words = [_filled_in(word, directory) for word in flags]
                _ENGINES[engine](_started(["--engine", engine, *words]), Path(directory))
            except WorkerError as error:
                return str(error)
            finally:
                os.chdir(here)
        return ""


def commands(engine: str, kind: str) -> Iterator[Command]:
    """Yield the commands of one kind: ``launch_scripts`` or ``deployments``."""
    data = yaml.safe_load((Path(__file__).parent / engine / "tests" / "data" / f"{kind}.yaml").read_text())
    values, files = data.pop("values"), data.pop("files", {})
    for name, entry in data.items():
        workers = tuple(_worker(line, values) for line in entry["workers"])
        yield Command(name, workers, tuple(entry.get("refused", ())), files)


def _worker(line: str, values: dict[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Split a line as a shell does: variables first, then the flags."""
    words = [Template(word).substitute(values) for word in shlex.split(line)]
    first = next(number for number, word in enumerate(words) if word.startswith("-"))
    return dict(word.split("=", 1) for word in words[:first]), tuple(words[first:])


def _filled_in(word: str, directory: str) -> str:
    """Return a word with real paths in the places of the neutral ones."""
    return word.replace("MODEL", directory).replace("DIRECTORY", directory).replace("FILE", f"{directory}/file.py")


def _started(argv: list[str]) -> argparse.Namespace:
    """Run the worker's own command line; instead of starting a worker, return the engine's parsed flags."""
    with contextlib.ExitStack() as stack:
        for name in _PREPARATIONS:
            stack.enter_context(mock.patch(name))
        launch = stack.enter_context(mock.patch("dynamo_worker.host.launcher.run", return_value=0))
        run.main(argv)
        _, _, engine_args = launch.call_args.args
    return engine_args


def _vllm(args: argparse.Namespace, directory: Path) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    from dynamo_worker_vllm import arguments
    from dynamo_worker_vllm.disaggregation import Role

    def without_model(self: AsyncEngineArgs, *_: Any, **__: Any) -> AsyncEngineArgs:
        return self

    with mock.patch.object(AsyncEngineArgs, "create_engine_config", without_model):
        Role(args.disaggregation_mode, arguments.configure(args, directory))


def _sglang(args: argparse.Namespace, directory: Path) -> None:
    from dynamo_worker_sglang import arguments

    arguments.configure(args, directory)


_ENGINES: Final[dict[str, Callable[[argparse.Namespace, Path], None]]] = {"vllm": _vllm, "sglang": _sglang}


def main(engine: str) -> int:
    """Print the judgement of every command; return 1 if one of them is not what it should be."""
    failed = 0
    for kind in ("launch_scripts", "deployments"):
        total = accepted = wrong = 0
        for command in commands(engine, kind):
            refusals = command.refusals(engine)
            problem = command.problem(refusals)
            total, accepted, wrong = total + 1, accepted + (not refusals), wrong + bool(problem)
            answer = refusals[0].partition("\n")[0] if refusals else "accepted"
            print(f"{'WRONG' if problem else 'ok':5}  {command.name:70}  {answer}", flush=True)
        print(f"{engine}, {kind}: {accepted} of {total} accepted, the others refused; {wrong} not as expected\n")
        failed += wrong
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
