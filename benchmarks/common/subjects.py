"""What runs behind the workers of a comparison: the echo engine, or a real engine under both kinds of worker."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from common.load import echo_text
from common.model import model_directory
from common.peer_environment import PEER_VERSION, cache_directory

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_PROGRAMS = Path(__file__).parent.parent / "workers"
PEER, BARE, OURS, BEFORE = "peer", "bare", "ours", "before"
#: What the tables call them.
TITLES = {
    PEER: "peer's Worker",
    BARE: "bare push handler",
    OURS: "dynamo-worker",
    BEFORE: "dynamo-worker before",
}


class Subject(Protocol):
    """An engine, and how each kind of worker is started with it."""

    @property
    def start_seconds(self) -> float:
        """Seconds in which a worker must be registered."""

    @property
    def stream_tokens(self) -> int:
        """Tokens of a stream of several seconds, longer than the grace period."""

    @property
    def spare_first(self) -> bool:
        """Whether a second worker starts so slowly that it must be there before the streams."""

    def model_directory(self, work_directory: Path) -> Path:
        """Return the directory of the model that all workers register, made if need be."""

    def command(self, kind: str, directory: Path, model: str, component: str, flags: Sequence[str]) -> list[str]:
        """Return the command line of a worker."""

    def environment(self, kind: str) -> Mapping[str, str]:
        """Return further environment variables of a worker."""

    def expected(self, kind: str, tokens: int) -> str | None:
        """Return the text of every answer of so many tokens, None where it is not known."""


@dataclass(frozen=True)
class Echo:
    """The echo engine under dynamo-worker, the same loop under NVIDIA's Rust Worker, and under no worker at all.

    :param peer_python: Python of the peer's environment, where the peer takes part.
    :param tokens_per_second: of each stream; None for as many as possible.
    :param before: checkout of another version of dynamo-worker, where that takes part.
    """

    peer_python: Path | None = None
    tokens_per_second: float | None = None
    before: Path | None = None
    start_seconds: float = 60.0
    stream_tokens: int = 240
    spare_first: bool = False

    def model_directory(self, work_directory: Path) -> Path:
        """Return the echo engine's own model."""
        return model_directory(work_directory)

    def command(self, kind: str, directory: Path, model: str, component: str, flags: Sequence[str]) -> list[str]:
        """Return the command line of a worker."""
        common = ["--model-name", model, "--component", component, *flags]
        if self.tokens_per_second is not None:
            common += ["--tokens-per-second", str(self.tokens_per_second)]
        if kind in (OURS, BEFORE):
            return [sys.executable, "-m", "dynamo_worker", "--engine", "echo", *common]
        python = sys.executable
        if kind == PEER:
            assert self.peer_python is not None
            python = str(self.peer_python)
        return [python, str(_PROGRAMS / f"{kind}_worker.py"), "--model-path", str(directory), *common]

    def environment(self, kind: str) -> Mapping[str, str]:
        """Return the way to the sources of the other version."""
        return {"PYTHONPATH": str((self.before / "core/src").resolve())} if kind == BEFORE and self.before else {}

    def expected(self, kind: str, tokens: int) -> str | None:
        """Return what the echo engine answers; the peer's minimal engine begins its text anew after a migration."""
        return echo_text(tokens) if kind in (OURS, BEFORE) else None


@dataclass(frozen=True)
class RealEngine:
    """A real engine under dynamo-worker and, in this same environment, under NVIDIA's own worker for it.

    :param name: of the plugin; the peer's module is ``dynamo.NAME``.
    :param model_flag: the engine's flag for the model's directory.
    :param flags: engine flags, the same for both.
    :param variables: environment variables, the same for both.
    :param settings: further variables for start and load, by the name of the setting: both are measured in each.
    :param processes: the engine's processes: a name, and a pattern of what their command lines begin with.
    :param peer_processes: the same of those that only the peer has.
    :param loading: what the engine logs once it is deep in its start.
    :param peer_packages: directory of the peer's packages, where the peer takes part.
    """

    name: str
    model_flag: str
    flags: tuple[str, ...]
    processes: Mapping[str, str]
    loading: str
    peer_processes: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: {"": {}})
    peer_packages: Path | None = None
    start_seconds: float = 240.0
    stream_tokens: int = 1500
    spare_first: bool = True

    def model_directory(self, work_directory: Path) -> Path:
        """Make a Llama with two layers and random weights."""
        from dynamo_worker.testing.tiny_model import make

        return make(work_directory / "model")

    def command(self, kind: str, directory: Path, model: str, component: str, flags: Sequence[str]) -> list[str]:
        """Return the command line of a worker."""
        served = [self.model_flag, str(directory), "--served-model-name", model]
        engine = [*served, *self.flags, *flags]
        if kind == OURS:
            return [sys.executable, "-m", "dynamo_worker", "--engine", self.name, "--component", component, *engine]
        return [
            sys.executable,
            "-m",
            f"dynamo.{self.name}",
            "--endpoint",
            f"dyn://dynamo.{component}.generate",
            *engine,
        ]

    def environment(self, kind: str) -> Mapping[str, str]:
        """Return the engine's variables, and for the peer the way to its packages."""
        # Kernels that are compiled once; with their default place in TMPDIR every start would compile them anew.
        lasting = {"TORCHINDUCTOR_CACHE_DIR": str(cache_directory() / "torchinductor")}
        variables = {**lasting, **self.variables, "DYN_NAMESPACE": "dynamo"}
        if kind == PEER:
            assert self.peer_packages is not None
            variables["PYTHONPATH"] = os.fspath(self.peer_packages)
        return variables

    def expected(self, kind: str, tokens: int) -> str | None:  # noqa: ARG002 - part of the protocol
        """Return None: the streams are compared by their numbers of tokens."""
        return None

    @property
    def titles(self) -> dict[str, str]:
        """What the tables call the workers."""
        return {PEER: f"dynamo.{self.name} {PEER_VERSION}", OURS: "dynamo-worker"}
