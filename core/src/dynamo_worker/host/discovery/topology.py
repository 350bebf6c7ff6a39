"""Where this worker is (zone, rack …), and which KV transfers routers may choose between such places.

A deployment says so with variables and with files, one for each kind of place. It may write the files after the worker
has started.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.errors import StartError, shown
from dynamo_worker.logs import get_logger
from dynamo_worker.supervisor.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Mapping

log = get_logger(__name__)

ENABLED: Final = "DYN_TOPOLOGY_ENABLED"
DIRECTORY: Final = "DYN_TOPOLOGY_MOUNT_PATH"
DOMAIN: Final = "DYN_KV_TRANSFER_DOMAIN"
ENFORCEMENT: Final = "DYN_KV_TRANSFER_ENFORCEMENT"
WEIGHT: Final = "DYN_KV_TRANSFER_PREFERRED_WEIGHT"

_DEFAULT_DIRECTORY: Final = "/etc/dynamo/topology"
_YES, _NO = ("true", "1", "yes", "on"), ("", "false", "0", "no", "off")
_ENFORCEMENTS: Final = ("required", "preferred")
#: Seconds until the file of the transfer domain must be there, and between two looks.
_PATIENCE, _PAUSE = 30.0, 1.0
#: Most files, and most bytes of each: a name of a place is short.
_MOST_FILES, _MOST_BYTES = 64, 1024


async def read(environ: Mapping[str, str] | None = None, *, patience: float = _PATIENCE) -> dict[str, Any]:
    """Return the topology as attributes of ``dynamo.llm.ModelRuntimeConfig``; empty if it is off.

    :param environ: the environment variables, ``os.environ`` by default.
    :param patience: seconds to wait for the file of the transfer domain.
    :raises StartError: a variable is missing or wrong, or the file does not appear.
    """
    variables = os.environ if environ is None else environ
    if not _enabled(variables.get(ENABLED, "")):
        return {}
    domain = variables.get(DOMAIN, "").strip()
    if not domain:
        raise StartError(
            f"{ENABLED} is set, but {DOMAIN} is not", hint=f"name the kind of place that decides, as {DOMAIN}=zone"
        )
    enforcement = variables.get(ENFORCEMENT) or _ENFORCEMENTS[0]
    if enforcement not in _ENFORCEMENTS:
        raise StartError(f"{ENFORCEMENT}: expected one of {', '.join(_ENFORCEMENTS)}, got {shown(enforcement)}")
    directory = variables.get(DIRECTORY) or _DEFAULT_DIRECTORY
    return {
        "topology_domains": await _domains(directory, domain, patience),
        "kv_transfer_domain": domain,
        "kv_transfer_enforcement": enforcement,
        "kv_transfer_preferred_weight": _weight(variables.get(WEIGHT)),
    }


def _enabled(value: str) -> bool:
    given = value.strip().lower()
    if given not in (*_YES, *_NO):
        log.warning("Topology is off: unknown value", variable=ENABLED, value=shown(value), expected="true or false")
    return given in _YES


def _weight(value: str | None) -> float | None:
    if not value:
        return None
    try:
        weight = float(value)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):  # JSON, in which the model card is written, has no other numbers
        raise StartError(f"{WEIGHT}: expected a number, got {shown(value)}")
    return weight


async def _domains(directory: str, wanted: str, patience: float) -> dict[str, str]:
    """Return the place of each kind once the wanted kind is there."""
    deadline = time.monotonic() + patience
    while True:
        # In a thread: the directory may be a network file system that hangs.
        found = await asyncio.to_thread(_read_files, directory)
        if wanted in found:
            log.info("Topology read", directory=directory, **{f"domain_{name}": found[name] for name in found})
            return found
        if time.monotonic() >= deadline:
            raise StartError(
                f"the file {os.path.join(directory, wanted)} does not exist or is empty after {patience:g} s",
                hint=f"let the deployment write it, or unset {ENABLED}",
            )
        log.info("Waiting for a topology file", file=os.path.join(directory, wanted))
        await asyncio.sleep(_PAUSE)


def _read_files(directory: str) -> dict[str, str]:
    """Return the content of each file that is visible, regular and not empty, by its name."""
    found = {}
    try:
        names = sorted(name for name in os.listdir(directory) if not name.startswith("."))
    except OSError:
        return {}
    for name in names[:_MOST_FILES]:
        try:
            with open(open_regular(os.path.join(directory, name), os.O_RDONLY), "rb") as file:
                value = file.read(_MOST_BYTES).decode().strip()
        except (OSError, UnicodeDecodeError):
            continue  # a directory, or not readable: reported if it is the one that is needed
        if value:
            found[name] = value
    return found
