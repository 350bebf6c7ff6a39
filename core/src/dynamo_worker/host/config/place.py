"""Where a worker registers, ``namespace.component.endpoint``: the short forms, and what Dynamo's operator adds."""

from __future__ import annotations

from typing import Any, Final

from dynamo_worker.errors import UsageError
from dynamo_worker.host.config.options import BY_NAME
from dynamo_worker.host.config.origins import DEFAULT, Origin

#: The values of one source with their origins, by field name.
Layer = dict[str, tuple[Any, Origin]]

#: The component of a worker for one phase of requests, where Dynamo's planner and dashboards look for it.
COMPONENTS: Final = {"prefill": "prefill"}
#: What Dynamo's operator calls the kinds of pods in ``DYN_COMPONENT``; these are no components.
_KINDS_OF_PODS: Final = ("worker", "prefill", "decode")


def expanded(layer: Layer) -> Layer:
    """Return the values of one source with an endpoint's path split, and without the words of Dynamo's operator.

    :raises UsageError: the path is malformed, or another value of the same source contradicts it.
    """
    component, origin = layer.get("component", (None, DEFAULT))
    if origin.kind == "environment" and component in _KINDS_OF_PODS:
        layer = {name: given for name, given in layer.items() if name != "component"}
    return _expand_endpoint(layer)


def append_suffix(values: dict[str, Any], origins: dict[str, Origin]) -> None:
    """Append the suffix of a rollout to the namespace, unless it is there or an endpoint's path gives the namespace."""
    suffix = values.get("namespace_worker_suffix")
    namespace = values.get("namespace", BY_NAME["namespace"].default)
    origin = origins.get("namespace", DEFAULT)
    if not suffix or not isinstance(namespace, str) or (origin != DEFAULT and origin == origins.get("endpoint")):
        return
    if not namespace.endswith(f"-{suffix}"):
        values["namespace"] = f"{namespace}-{suffix}"
        origins["namespace"] = Origin(origin.kind, origin.name, f"with {origins['namespace_worker_suffix']}")


def _expand_endpoint(layer: Layer) -> Layer:
    """Split an endpoint given as ``dyn://namespace.component.endpoint`` into its three settings."""
    value, origin = layer.get("endpoint", (None, DEFAULT))
    if not isinstance(value, str) or ("." not in value and "://" not in value):
        return layer
    parts = value.removeprefix("dyn://").split(".")
    if len(parts) != 3 or not all(parts):
        raise UsageError(
            f"{origin.describe('endpoint', value)}: expected a name, or a path dyn://namespace.component.endpoint"
        )
    layer = dict(layer)
    for name, part in zip(("namespace", "component", "endpoint"), parts, strict=True):
        given, given_origin = layer.get(name, (part, origin))
        if name != "endpoint" and given != part:
            raise UsageError(
                f"{origin.describe('endpoint', value)} conflicts with {given_origin.describe(name, given)}"
            )
        layer[name] = (part, origin)
    return layer
