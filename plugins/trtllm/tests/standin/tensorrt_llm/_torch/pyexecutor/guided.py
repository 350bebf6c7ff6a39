"""Guided decoding in a minimal real way: the text of one valid answer, in the tokens of the model's tokenizer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tensorrt_llm.sampling_params import GuidedDecodingParams

try:
    from re import _constants as constants
    from re import _parser as parser
except ImportError:
    import sre_constants as constants
    import sre_parse as parser


def valid_text(guide: GuidedDecodingParams) -> str | None:
    """Return a text that the guide admits; None for a grammar or a structural tag, which the stand-in ignores.

    Raises ValueError for a schema or a regular expression that cannot be read.
    """
    if guide.json_object:
        return json.dumps({"answer": "made up"})
    if guide.json is not None:
        return json.dumps(_instance(_schema(guide.json)))
    if guide.regex is not None:
        try:
            return _match(parser.parse(guide.regex))
        except re.error as error:
            raise ValueError(f"guided decoding: bad regular expression {guide.regex!r}: {error}") from error
    return None


def valid_tokens(guide: GuidedDecodingParams, model: str) -> list[int] | None:
    """Return the tokens of `valid_text`; None where the guide is ignored or the model has no `tokenizer.json`."""
    text = valid_text(guide)
    path = Path(model) / "tokenizer.json"
    if text is None or not path.is_file():
        return None
    from tokenizers import Tokenizer

    return list(Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids)


def _schema(value: Any) -> dict[str, Any]:
    if hasattr(value, "model_json_schema"):
        return value.model_json_schema()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"guided decoding: the JSON schema is not JSON: {error}") from error
    return value


def _instance(schema: dict[str, Any]) -> Any:
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return _instance(schema[key][0])
    kind = schema.get("type", "object")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        known = schema.get("properties", {})
        return {name: _instance(known.get(name, {"type": "string"})) for name in schema.get("required", known)}
    if kind == "array":
        return [_instance(schema.get("items", {"type": "string"}))] * schema.get("minItems", 0)
    if kind == "string":
        return "x" * schema.get("minLength", 1)
    return {"integer": schema.get("minimum", 1), "number": schema.get("minimum", 1), "boolean": True}.get(kind)


def _match(pattern: Any) -> str:
    text = ""
    for code, value in pattern:
        if code is constants.LITERAL:
            text += chr(value)
        elif code is constants.NOT_LITERAL:
            text += "a" if value != ord("a") else "b"
        elif code is constants.ANY:
            text += "a"
        elif code is constants.BRANCH:
            text += _match(value[1][0])
        elif code is constants.SUBPATTERN:
            text += _match(value[3])
        elif code in (constants.MAX_REPEAT, constants.MIN_REPEAT):
            text += _match(value[2]) * value[0]
        elif code is constants.IN:
            text += _member(value)
        elif code is not constants.AT:
            raise ValueError(f"guided decoding: the stand-in does not know {code} in a regular expression")
    return text


def _member(members: Any) -> str:
    examples = {constants.CATEGORY_DIGIT: "1", constants.CATEGORY_WORD: "a", constants.CATEGORY_SPACE: " "}
    code, value = members[0]
    if code is constants.LITERAL:
        return chr(value)
    if code is constants.RANGE:
        return chr(value[0])
    if code is constants.CATEGORY and value in examples:
        return examples[value]
    raise ValueError(f"guided decoding: the stand-in does not know {code} in a regular expression")
