"""The spellings of an engine's flags that only the engine's own command line knows."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

#: Flags that a message about an abbreviation lists.
_MOST_LISTED: Final = 8


def respelled(words: Sequence[str], known: Collection[str]) -> list[str]:
    """Return the command line with every flag in the engine's own spelling.

    Engines' own command lines accept ``--max_model_len`` for ``--max-model-len``, and ``--config.key 3`` for one key of
    a flag whose value is a JSON object, ``--config.list+ a,b`` for the items of a list in it.

    :param known: the engine's flags.
    :raises UsageError: a flag is given both as a whole and by its keys.
    """
    result: list[str] = []
    parts: dict[str, dict[str, Any]] = {}
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if word == "--":
            result += [word, *waiting]
            break
        flag, equals, value = word.partition("=")
        head, dot, path = flag.partition(".")
        dashed = head if head in known else head.replace("_", "-")
        if not word.startswith("-") or dashed not in known:
            result.append(word)
        elif not dot:
            result.append(dashed + equals + value)
        else:
            if not equals:
                value = waiting.pop(0) if waiting and not waiting[0].startswith("--") else "true"
            _put(parts.setdefault(dashed, {}), path.split("."), value)
    for flag, given in parts.items():
        if any(word.partition("=")[0] == flag for word in result):
            raise UsageError(f"{flag} is given both as a whole and by its keys ({flag}.{next(iter(given))})")
    # Nothing after a bare `--` is a flag.
    at = result.index("--") if "--" in result else len(result)
    return [*result[:at], *(f"{flag}={json.dumps(given)}" for flag, given in parts.items()), *result[at:]]


def unabbreviated(words: Sequence[str], names: Mapping[str, object], others: Collection[str]) -> list[str]:
    """Return the command line with the engine's flags in full where only their beginning is given.

    :param names: what each flag of the engine stands for; several may stand for the same.
    :param others: flags that the engine does not have, and that may have been meant as well.
    :raises UsageError: several flags may be meant; the message lists them.
    """
    at = list(words).index("--") if "--" in words else len(words)
    return [*(_in_full(word, names, others) for word in words[:at]), *words[at:]]


def _in_full(word: str, names: Mapping[str, object], others: Collection[str]) -> str:
    flag, equals, value = word.partition("=")
    head, dot, path = flag.partition(".")
    if not head.startswith("--") or len(head) == 2 or head in names or head in others:
        return word
    dashed = head.replace("_", "-")
    found = [name for name in names if name.startswith((head, dashed))]
    if not found:
        return word
    rivals = [name for name in others if name.startswith((head, dashed))]
    if len({id(names[name]) for name in found}) + len(rivals) > 1:
        candidates = sorted({*found, *rivals})
        listed = ", ".join(candidates[:_MOST_LISTED])
        more = f" or {len(candidates) - _MOST_LISTED} others" if len(candidates) > _MOST_LISTED else ""
        raise UsageError(f"{head} is ambiguous: it may stand for {listed}{more}", hint="write the flag in full")
    return found[0] + dot + path + equals + value


def _put(into: dict[str, Any], path: Sequence[str], text: str) -> None:
    """Set one key, at any depth, of a JSON object; text that is not valid JSON becomes a string."""
    *above, last = path
    if last.endswith("+"):
        last, text = last[:-1], json.dumps(text.split(","))
    for key in above:
        inner = into.setdefault(key, {})
        if not isinstance(inner, dict):
            raise UsageError(f"{'.'.join(path)}: {key} already has a value")
        into = inner
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    before = into.get(last)
    into[last] = [*before, *value] if isinstance(before, list) and isinstance(value, list) else value
