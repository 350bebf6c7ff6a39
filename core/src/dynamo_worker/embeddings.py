"""What an embedding engine receives and answers: one form for all that clients and frontends send.

An engine is an embedding engine if its ``EngineInfo.embeddings`` is set. What frontends of Dynamo 1.6.1 send and accept
was measured on the real frontend. The worker turns their requests, with tokens or with text, into
:class:`EmbeddingRequest`, and :class:`EmbeddingAnswer` into what they expect. Base64 is its business, and so is whether
each input has its vector.
"""

from __future__ import annotations

from collections.abc import Sequence  # noqa: TC003 - typing.get_type_hints looks them up
from dataclasses import dataclass
from typing import TypedDict


@dataclass(frozen=True)
class EmbeddingSpec:
    """The vectors of an embedding engine, and what one request may ask for.

    :param dimensions: numbers in a vector, unless the client asks for fewer.
    :param shorter: the ``dimensions`` that a client may ask for instead: True for any up to this spec's, or the
        numbers themselves. Otherwise the worker refuses the field: a model that was not trained for it gives vectors
        that mean nothing.
    :param most_inputs: most inputs in a request.
    """

    dimensions: int
    shorter: bool | Sequence[int] = False
    most_inputs: int = 2048


class _Inputs(TypedDict):
    model: str
    inputs: list[str | list[int]]


class EmbeddingRequest(_Inputs, total=False):
    """One request: a batch of inputs, each of which becomes a vector.

    :param model: the name the client asked for. Always a text here.
    :param inputs: one or more texts or lists of token ids, none of them empty. Only token ids if
        ``EngineInfo.model_input`` is ``tokens``: the frontend has tokenized. Token ids lie in
        ``EngineInfo.vocab_size``, and there are at most ``EngineInfo.context_length`` of them; the length of a text in
        tokens is the engine's to check.
    :param dimensions: numbers in each vector; one that the engine's ``EmbeddingSpec`` allows. Missing: all.
    :param truncate_prompt_tokens: cut texts to so many tokens, to the context length if it is -1. For tokens, the
        frontend has done it.
    :param add_special_tokens: whether to add special tokens to texts; missing: as the model's tokenizer does it.
    """

    dimensions: int
    truncate_prompt_tokens: int
    add_special_tokens: bool


class EmbeddingAnswer(TypedDict):
    """The whole answer to one request. An engine yields it once.

    :param embeddings: the vectors in the order of the inputs, each as numbers or as the bytes of little-endian 32-bit
        floats, which is faster. All have the length that was asked for, and every number is finite: otherwise the
        client gets HTTP 500.
    :param prompt_tokens: tokens of all inputs together, as the engine has counted them.
    """

    embeddings: Sequence[Sequence[float] | bytes]
    prompt_tokens: int
