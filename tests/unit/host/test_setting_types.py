"""The types of settings: lists in several spellings, and names that exist."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from dynamo_worker.address import Address
from dynamo_worker.host.config import setting_types as types


@pytest.mark.parametrize("value", ["a,b", "a, b,", ["a", "b"], ("a,b",)])
def test_words(value):
    assert TypeAdapter(types.Words).validate_python(value) == ("a", "b")


def test_endpoint_types_are_the_runtimes():
    from dynamo.llm import ModelType

    names = {name.lower() for name in dir(ModelType) if name[0].isupper()}
    assert set(types.ENDPOINT_TYPES) <= names


def test_an_unknown_endpoint_type_has_a_suggestion():
    with pytest.raises(ValidationError, match="got 'complete', did you mean completions"):
        TypeAdapter(types.EndpointTypes).validate_python("chat,complete")


def test_an_address_is_printed_as_it_is_written():
    adapter = TypeAdapter(types.FrontendAddress)
    assert adapter.validate_python(9000) == Address("127.0.0.1", 9000)
    assert adapter.dump_python(Address("::1", 80)) == "[::1]:80"
    assert adapter.dump_python(None) is None
