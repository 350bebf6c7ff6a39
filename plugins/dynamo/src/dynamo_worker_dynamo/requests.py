"""Requests as Dynamo's own worker hands them to an engine class: checked, and with every section present."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.kit import fields, guided_decoding
from dynamo_worker.kit.translation import OUTPUT, SAMPLING, STOP, ModelTable, RequestTable
from dynamo_worker.requests import Request

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

#: The longest sequence of a class that states none.
_UNLIMITED: Final = 2**31


def _guided_decoding(_: str, value: Any) -> Any:
    return guided_decoding.read(value)


#: The fields of each section. Values are only checked and stay as they are: the class reads the request itself.
_SAMPLING: Final = {**SAMPLING, "guided_decoding": ("", _guided_decoding)}
_EXTRA: Final = {"logit_bias": ("", fields.logit_bias), "allowed_token_ids": ("", fields.allowed_token_ids)}
#: Those that no class may ignore, or none honours.
_FIXED: Final = frozenset({"max_tokens", "stop_token_ids_hidden", "best_of", "use_beam_search", "length_penalty"})
#: The fields that an operator may have refused, and the value with which each asks for nothing.
REFUSABLE: Final[Mapping[str, Any]] = {
    **{name: None for name, entry in {**_SAMPLING, **STOP, **OUTPUT, **_EXTRA}.items() if entry and name not in _FIXED},
    "n": 1,
    "guided_decoding": {},
    "stop_token_ids": [],
    "ignore_eos": False,
    "min_tokens": 0,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "top_p": 1,
    "min_p": 0,
}


def table(refused: Collection[str] = ()) -> RequestTable:
    """Return the table of an engine class.

    :param refused: the fields that the class ignores, so that requests with them are refused.
    """

    def without(section: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: ("", fields.unsupported(REFUSABLE[name])) if name in refused else entry
            for name, entry in section.items()
        }

    sampling = without(_SAMPLING)
    extra = {**sampling, **without(_EXTRA)}
    return RequestTable(sampling, without(STOP), without(OUTPUT), extra, frozenset(Request.__annotations__))


class ClassTable(ModelTable[dict[str, Any]]):
    """Prepares requests for one model."""

    def __init__(self, context_length: int | None, refused: Collection[str] = ()) -> None:
        """Take what is known about the class and its model.

        :param context_length: longest sequence in tokens; None if the class states none.
        :param refused: see :func:`table`.
        """
        super().__init__(table(refused), {}, context_length or _UNLIMITED)

    def convert(self, values: dict[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
        """Return a copy of the request that the class may change; a token limit that was given fits the context."""
        prepared = {**request}
        for name in ("sampling_options", "stop_conditions", "output_options"):
            prepared[name] = dict(fields.section(request, name))
        stop = prepared["stop_conditions"]
        if stop.get("max_tokens") is not None:
            stop["max_tokens"] = values["max_tokens"]
        return prepared
