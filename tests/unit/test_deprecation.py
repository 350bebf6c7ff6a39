"""Deprecations: one text for all, collected without touching warning filters or other warnings."""

from __future__ import annotations

import warnings

import pytest

from dynamo_worker.deprecation import RemovedInApi2Warning, collect_deprecations, deprecated


def test_the_text_says_what_since_when_and_what_to_use():
    assert str(deprecated("the hook 'x'", since="1.3", use="'y'")) == (
        "the hook 'x' is deprecated since API 1.3 and goes away in API 2.0: use 'y'"
    )


@pytest.mark.filterwarnings("default")
def test_deprecations_are_collected_and_other_warnings_are_shown(recwarn):
    with collect_deprecations() as found:
        warnings.warn(deprecated("a", since="1.1", use="b"), stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)
    assert [text.partition(" (")[0] for text in found] == [str(deprecated("a", since="1.1", use="b"))]
    assert f"{__file__}:" in found[0]
    assert [str(warning.message) for warning in recwarn] == ["something else"]


def test_filters_that_are_set_in_the_block_stay():
    """A plugin's package may set filters when it is imported."""
    before = list(warnings.filters)
    with collect_deprecations():
        warnings.filterwarnings("ignore", message="set by a plugin")
    assert list(warnings.filters) != before
    warnings.filters[:] = before


def test_showing_warnings_is_as_before_after_the_block_also_after_an_error():
    show = warnings.showwarning
    with pytest.raises(ValueError, match="x"), collect_deprecations():
        raise ValueError("x")
    assert warnings.showwarning is show


def test_python_shows_them_by_default():
    assert not issubclass(RemovedInApi2Warning, DeprecationWarning)
