"""The pydantic types of settings: how the words of a flag, a variable or a YAML file become values."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer

from dynamo_worker.address import Address
from dynamo_worker.allowed_paths import check_load_roots, check_write_roots
from dynamo_worker.host.config.options import DEFAULT_FRONTEND
from dynamo_worker.suggest import suggestion

#: The OpenAI APIs a model can be registered for: the members of ``dynamo.llm.ModelType`` in lower case.
ENDPOINT_TYPES: Final = (
    "chat",
    "completions",
    "embedding",
    "classify",
    "pooling",
    "rerank",
    "images",
    "audios",
    "videos",
    "realtime",
    "tensorbased",
    "empty",
)

_YES_AND_NO: Final = {
    **dict.fromkeys(("true", "1", "yes", "on"), True),
    **dict.fromkeys(("false", "0", "no", "off"), False),
}
#: The keys of a structural tag's configuration, and their values.
_STRUCTURAL_TAG: Final[dict[str, tuple[object, ...]]] = {
    "scope": ("auto", "always"),
    "schema": ("auto", "strict"),
    "allow_tool_calls_with_structured_output": (True, False),
    "exclude_special_tokens": (True, False, None),
    "reasoning_boundary": ("auto", "structural_tag", "backend"),
    "tool_arguments_any_order": (True, False),
}


def _split_list(value: object) -> object:
    """Accept ``a,b`` wherever a list is expected."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, (list, tuple)):
        return tuple(part.strip() for item in value for part in str(item).split(",") if part.strip())
    return value


def _parse_address(value: object) -> object:
    """Accept ``HOST:PORT``, ``HOST``, ``PORT`` and the words for yes and no."""
    if value is None or value is False:
        return None
    if value is True:
        value = DEFAULT_FRONTEND
    if isinstance(value, Address) or not isinstance(value, (str, int)):
        return value
    text = str(value).strip()
    if text.lower() in ("true", "yes", "on", ""):
        text = DEFAULT_FRONTEND
    if text.lower() in ("false", "no", "off"):
        return None
    return Address.parse(text, DEFAULT_FRONTEND)


def _check_endpoint_types(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name not in ENDPOINT_TYPES:
            expected = f"expected {', '.join(ENDPOINT_TYPES)}, got {name!r}"
            raise ValueError(expected + suggestion(name, ENDPOINT_TYPES))
    return names


def _endpoint_types(names: tuple[str, ...]) -> tuple[str, ...]:
    """Accept ``none``, the word of Dynamo's own workers for a model that no frontend shall offer."""
    if "none" in names:
        if len(names) > 1:
            raise ValueError("`none` cannot be combined with other names")
        return ("empty",)
    return _check_endpoint_types(names)


def _structural_tag(value: object) -> object:
    """Read a JSON object, or one of the words for yes and no.

    :raises ValueError: it is anything else, or has unknown keys or values.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        word = value.strip().lower()
        if word in _YES_AND_NO:
            return _YES_AND_NO[word]
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError("expected true, false or a JSON object") from error
    if not isinstance(value, dict):
        raise ValueError("expected true, false or a JSON object")
    for key, given in value.items():
        accepted = _STRUCTURAL_TAG.get(key)
        if accepted is None:
            raise ValueError(f"unknown key {key!r}{suggestion(str(key), _STRUCTURAL_TAG)}")
        # `1 in (False, True)` holds, but 1 is no boolean.
        if not any(given is word or (isinstance(word, str) and given == word) for word in accepted):
            shown = ", ".join(json.dumps(word) for word in accepted)
            raise ValueError(f"{key}: expected one of {shown}, got {json.dumps(given)}")
    return value


def _endpoint_path(path: str | None) -> str | None:
    parts = (path or "").removeprefix("dyn://").split(".")
    if path is not None and (len(parts) != 3 or not all(parts)):
        raise ValueError("expected a path dyn://namespace.component.endpoint")
    return path


def _check_installed_plugins(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise ValueError("expected `all`, `none`, or names separated by commas")
    if len(names) > 1 and {"all", "none"}.intersection(names):
        raise ValueError("`all` and `none` cannot be combined with other names")
    return names


#: A list, also written ``a,b``.
Words = Annotated[tuple[str, ...], BeforeValidator(_split_list)]
#: Names of installed plugins, ``all`` or ``none``.
InstalledPlugins = Annotated[Words, AfterValidator(_check_installed_plugins)]
#: Members of :data:`ENDPOINT_TYPES`.
EndpointTypes = Annotated[Words, AfterValidator(_endpoint_types)]
#: How tool calls are constrained: all keys optional, or simply on or off. None leaves it to Dynamo.
StructuralTag = Annotated[bool | dict[str, Any] | None, BeforeValidator(_structural_tag)]
#: ``dyn://namespace.component.endpoint``.
EndpointPath = Annotated[str | None, AfterValidator(_endpoint_path)]
#: Directories and URIs from which control routes may load.
LoadRoots = Annotated[Words, AfterValidator(check_load_roots)]
#: Directories in which control routes may write.
WriteRoots = Annotated[Words, AfterValidator(check_write_roots)]
#: One part of ``namespace.component.endpoint``.
PathPart = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
#: Where the frontend listens; None without one. Printed as ``HOST:PORT``.
FrontendAddress = Annotated[
    Address | None,
    BeforeValidator(_parse_address),
    PlainSerializer(lambda value: None if value is None else str(value)),
]
