"""Compares what a worker registers and measures with a record of Dynamo's own worker on the same engine.

A record is a JSON file with ``card``, the model card, and ``series``, the labels of each metric series by its name.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from dynamo_worker.host.discovery.fleet import STATUS_ADDRESS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

#: Places of a worker in the topology of a record, by kind.
TOPOLOGY = {"zone": "zone-a", "rack": "rack-7"}
#: What stands for a value that differs from run to run.
LOCAL = "LOCAL"

_LOCAL_TEXT = re.compile(r"blake3:\w+|\d+\.\d+\.\d+\.\d+")
_SAMPLE = re.compile(r"([A-Za-z_:][\w:]*)(?:\{(.*)\})? \S+")
_LABEL = re.compile(r'([A-Za-z_]\w*)="(?:[^"\\]|\\.)*"')


def topology_variables(directory: Path) -> dict[str, str]:
    """Write the topology of a record into a new directory, and return the variables that make a worker read it."""
    directory.mkdir()
    for name, value in TOPOLOGY.items():
        (directory / name).write_text(value)
    return {
        "DYN_TOPOLOGY_ENABLED": "true",
        "DYN_TOPOLOGY_MOUNT_PATH": str(directory),
        "DYN_KV_TRANSFER_DOMAIN": "zone",
        "DYN_KV_TRANSFER_ENFORCEMENT": "preferred",
        "DYN_KV_TRANSFER_PREFERRED_WEIGHT": "0.85",
    }


def series(text: str) -> dict[str, list[str]]:
    """Return the labels of each series in Prometheus' text format, by the series' name."""
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        match = _SAMPLE.match(line)
        if match is not None:
            found.setdefault(match[1], set()).update(_LABEL.findall(match[2] or ""))
    return {name: sorted(labels) for name, labels in sorted(found.items())}


def card(discovery: Path, instance: str) -> dict[str, Any]:
    """Return the model card of an instance in the ``file`` discovery, without what differs from run to run."""
    (entry,) = [path for path in (discovery / "v1" / "mdc").iterdir() if instance in path.name]
    content = json.loads(entry.read_text(encoding="utf-8"))
    found: dict[str, Any] = _plain(content.get("card_json", content))
    config = found["runtime_config"]
    config["taints"] = sorted(config.get("taints", ()))  # a set
    data = config.get("runtime_data", {})
    if data.pop(STATUS_ADDRESS, None) is not None and not data:
        del config["runtime_data"]
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: LOCAL if key.endswith("_port") else _plain(item) for key, item in sorted(value.items())}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith(("/", "hf://", "file://")):
        name = value.rpartition("/")[2]
        return f"{LOCAL}/{name}" if "." in name else LOCAL
    return _LOCAL_TEXT.sub(LOCAL, value)


def card_differences(recorded: Any, found: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the fields in which two cards differ: the path, what was recorded and what was found; None if missing."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        for key in sorted(recorded.keys() | found.keys()):
            yield from card_differences(recorded.get(key), found.get(key), f"{where}.{key}".lstrip("."))
    elif recorded != found:
        yield where, recorded, found


def missing_series(recorded: Mapping[str, list[str]], found: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Return the recorded series that were not found, and those that lack labels, with these labels."""
    missing = {}
    for name, labels in recorded.items():
        lacking = sorted(set(labels) - set(found.get(name, ())))
        if name not in found or lacking:
            missing[name] = lacking
    return missing
