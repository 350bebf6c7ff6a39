"""LoRA adapters: loaded and unloaded while the worker serves, each registered as its own model."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from dynamo.llm import LoRADownloader, lora_name_to_id

from dynamo_worker.errors import InvalidRequestError, shown
from dynamo_worker.kit import request_limits as limits
from dynamo_worker.kit.fields import section
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from dynamo_worker.engine import EngineContext, Operation

log = get_logger(__name__)

#: Seconds between two checks whether an adapter is still in use.
_POLL_SECONDS = 0.05


@dataclass
class LoraAdapter:
    """A loaded LoRA adapter.

    :ivar name: the model name that clients use.
    :ivar number: its id in Dynamo, derived from the name.
    :ivar path: directory of its weights.
    :ivar in_use: number of requests that use it.
    """

    name: str
    number: int
    path: str
    in_use: int = 0


class LoraLoader(Protocol):
    """How an engine loads and unloads adapters."""

    async def load(self, adapter: LoraAdapter) -> None:
        """Load the weights; an exception tells the caller why they cannot be loaded."""

    async def unload(self, adapter: LoraAdapter) -> None:
        """Free the weights of an adapter that is no longer in use."""


class OnDemand:
    """Checks adapters for an engine that loads one with its first request, and drops it when it needs the room."""

    def __init__(self, check: Callable[[LoraAdapter], object]) -> None:
        """Take the check.

        :param check: raises an error for an adapter that the engine could not load; called in a thread.
        """
        self._check = check

    async def load(self, adapter: LoraAdapter) -> None:
        """Check the adapter's files."""
        await asyncio.to_thread(self._check, adapter)

    async def unload(self, adapter: LoraAdapter) -> None:
        """Do nothing: no more requests name the adapter, so others take its room."""


class LoraAdapters:
    """The LoRA adapters of one worker."""

    def __init__(
        self,
        loader: LoraLoader,
        context: EngineContext,
        model_names: Collection[str] = (),
        loaded: Mapping[str, str] | None = None,
    ) -> None:
        """Start with the adapters that the engine has loaded itself.

        :param context: limits where adapters may be loaded from, and registers them.
        :param model_names: the names of the model itself: its path and those that clients use. If empty, every
            unknown name means the model itself.
        :param loaded: directories of the loaded adapters' weights, by name.
        """
        self._loader = loader
        self._context = context
        self._model_names = frozenset(model_names)
        self._lock = asyncio.Lock()
        self._loaded = {name: LoraAdapter(name, lora_name_to_id(name), path) for name, path in (loaded or {}).items()}

    def names(self) -> Sequence[str]:
        """Return the names of the loaded adapters."""
        return tuple(self._loaded)

    def operations(self) -> dict[str, Operation]:
        """Return the operations by route name."""
        return {"load_lora": self.load, "unload_lora": self.unload, "list_loras": self.list}

    def begin(self, name: str | None) -> LoraAdapter | None:
        """Return the adapter for a request, which stays loaded until :meth:`end`; None for the model itself.

        :raises InvalidRequestError: no model or adapter has this name.
        """
        adapter = None if name is None else self._loaded.get(name)
        if adapter is not None:
            adapter.in_use += 1
        elif name is not None and self._model_names and name not in self._model_names:
            raise InvalidRequestError(f"there is no model or LoRA adapter {shown(name)} on this worker")
        return adapter

    @staticmethod
    def end(adapter: LoraAdapter | None) -> None:
        """Release the adapter of a request that has ended."""
        if adapter is not None:
            adapter.in_use -= 1

    async def load(self, body: dict[str, Any]) -> dict[str, Any]:
        """Load ``lora_name`` from ``source.uri`` and register it as its own model."""
        name, uri = body.get("lora_name"), section(body, "source").get("uri")
        if not isinstance(name, str) or not name or not isinstance(uri, str) or not uri:
            raise InvalidRequestError('expected {"lora_name": NAME, "source": {"uri": "file:///…" or "s3://…"}}')
        limits.ADDRESS_CHARACTERS.check("source.uri", len(uri))
        self._check_name(name)
        async with self._lock:
            adapter = self._loaded.get(name)
            if adapter is not None:
                return _answer(adapter, "is loaded already")
            number = lora_name_to_id(name)
            for other in self._loaded.values():
                if other.number == number:  # engines and routers go by the number
                    raise InvalidRequestError(
                        f"lora_name: {shown(name)} has the same id as the loaded adapter {other.name!r}; "
                        "choose another name"
                    )
            adapter = LoraAdapter(name, number, await self._fetch(uri))
            await self._loader.load(adapter)
            self._loaded[name] = adapter
            try:
                await self._context.discovery.register_adapter(name)
            except Exception:
                del self._loaded[name]
                await self._loader.unload(adapter)
                raise
        log.info("LoRA adapter loaded", name=name, path=adapter.path)
        return _answer(adapter, "loaded")

    def _check_name(self, name: str) -> None:
        """Refuse a name that cannot be a model's.

        :raises InvalidRequestError: it is too long, not printable, or taken.
        """
        limits.NAME_CHARACTERS.check("lora_name", len(name))
        if not name.isprintable() or name != name.strip():
            raise InvalidRequestError(f"lora_name: {shown(name)} has control characters or surrounding spaces")
        if name in self._model_names:
            raise InvalidRequestError(f"lora_name: {shown(name)} is the name of the model itself; choose another name")

    async def _fetch(self, uri: str) -> str:
        """Return the directory of an adapter, downloaded if necessary."""
        allowed = await asyncio.to_thread(self._context.allowed_paths.to_load, uri)
        if urlsplit(allowed).scheme:
            return str(await LoRADownloader().download_if_needed(allowed))
        if not await asyncio.to_thread((Path(allowed) / "adapter_config.json").is_file):
            raise InvalidRequestError(f"{allowed} is not a LoRA adapter: adapter_config.json is missing")
        return allowed

    async def unload(self, body: dict[str, Any]) -> dict[str, Any]:
        """Take ``lora_name`` out of discovery, wait for its requests, and unload it."""
        name = body.get("lora_name")
        async with self._lock:
            adapter = self._loaded.get(name) if isinstance(name, str) else None
            if adapter is None:
                raise InvalidRequestError(f"there is no LoRA adapter {shown(name)}; loaded: {sorted(self._loaded)}")
            await self._context.discovery.unregister_adapter(adapter.name)
            while adapter.in_use:
                await asyncio.sleep(_POLL_SECONDS)
            del self._loaded[adapter.name]
            await self._loader.unload(adapter)
        log.info("LoRA adapter unloaded", name=adapter.name)
        return _answer(adapter, "unloaded")

    async def list(self, body: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002 - every operation has a body
        """Return the loaded adapters and their ids."""
        return {"loras": {name: adapter.number for name, adapter in self._loaded.items()}, "count": len(self._loaded)}


def _answer(adapter: LoraAdapter, what: str) -> dict[str, Any]:
    return {"message": f"{adapter.name} {what}", "lora_name": adapter.name, "lora_id": adapter.number}
