"""Limits on the parts of a request: well beyond real use, but no burden to the event loop or an engine."""

from __future__ import annotations

from typing import Final, NamedTuple

from dynamo_worker.errors import InvalidRequestError


class Limit(NamedTuple):
    """A limit on one part of a request.

    :param most: the largest accepted number.
    :param unit: what is counted.
    :param parts: the parts of a request that it applies to.
    """

    most: int
    unit: str
    parts: str

    def check(self, name: str, number: int) -> None:
        """Refuse a number above the limit.

        :param name: the field's name, for the message.
        :raises InvalidRequestError: the number is too large.
        """
        if number > self.most:
            raise InvalidRequestError(f"{name}: {number} {self.unit} are too many, at most {self.most} are accepted")


_JSON: Final = (
    "`guided_decoding.json`, `guided_decoding.structural_tag`, and other objects that are passed on as they are "
    "(`kv_hint`, `custom_params`, `reasoning_parser_kwargs`)"
)

#: An engine turns each answer into a separate request.
ANSWERS: Final = Limit(128, "answers", "`n`")
STOP_TOKENS: Final = Limit(1024, "tokens", "each list of stop tokens; `logprob_token_ids`")
#: The end of a text is compared with the beginning of each, for each chunk.
STOP_STRINGS: Final = Limit(32, "strings", "`stop`, for text engines")
STOP_STRING_CHARACTERS: Final = Limit(256, "characters", "each of them")
ALLOWED_TOKENS: Final = Limit(2**18, "tokens", "`allowed_token_ids`")
BIASES: Final = Limit(4096, "tokens", "`logit_bias`")
#: Each is a Python object, and those of a prompt are made at once on the event loop.
PROMPT_LOGPROBS: Final = Limit(2**17, "log-probabilities", "the tokens of the prompt times `prompt_logprobs` + 1")
LOGPROBS: Final = Limit(128, "log-probabilities", "`logprobs` and `prompt_logprobs` (vLLM: `--max-logprobs`)")
JSON_CHARACTERS: Final = Limit(2**18, "characters", _JSON)
JSON_VALUES: Final = Limit(2**14, "values", "the same: values at all levels together")
#: Grammar compilers take time cubic in the levels of a schema: 0.05 s for 64 nested objects, 2.5 s for 256 (measured,
#: xgrammar 0.2.7). Each nested object counts as two levels.
JSON_LEVELS: Final = Limit(64, "levels", "the same: objects and lists inside of each other")
JSON_REFERENCES: Final = Limit(2**11, "references", "different `$ref` in a JSON schema")
#: Grammar compilers recurse on the stack of their process. With 8 MB of stack 6000 levels end vLLM with SIGSEGV, 2000
#: do not (measured, llguidance 1.7.6; xgrammar 0.2.7 takes more).
JSON_WAY: Final = Limit(2**10, "levels", "a JSON schema: on the longest way through references, circles counted once")
REGEX_CHARACTERS: Final = Limit(2**13, "characters", "`guided_decoding.regex`; each `pattern` in a JSON schema")
#: The time that a token costs all requests of a batch is quadratic in the optional parts: 24 ms for 250 times `a?`,
#: 661 ms for 1000 (measured, xgrammar 0.2.7, 3127 tokens).
REGEX_QUANTIFIERS: Final = Limit(2**8, "quantifiers", "the same: `?`, `*`, `+`, `{n}` and empty alternatives")
GRAMMAR_CHARACTERS: Final = Limit(2**16, "characters", "`guided_decoding.grammar`; `custom_logit_processor`")
WHITESPACE_CHARACTERS: Final = Limit(256, "characters", "`guided_decoding.whitespace_pattern`")
CHOICES: Final = Limit(10_000, "choices", "`guided_decoding.choice`")
CHOICE_CHARACTERS: Final = Limit(2**17, "characters", "all choices together")
NAME_CHARACTERS: Final = Limit(256, "characters", "the name of a LoRA adapter; `bootstrap_host`")
ADDRESS_CHARACTERS: Final = Limit(4096, "characters", "the `source.uri` of a LoRA adapter")
ID_CHARACTERS: Final = Limit(1024, "characters", "`cache_salt`, `session_id`")

#: All of them, for the documentation.
ALL: Final = tuple(value for value in list(globals().values()) if isinstance(value, Limit))
