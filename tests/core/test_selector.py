"""Label selectors, as kubectl reads them."""

from __future__ import annotations

import pytest

from mantle.core.selector import BadSelector, Selector, parse

LABELS = {"app": "web", "tier": "front", "mantle.dev/x": "1", "empty": ""}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("", True),
        ("app=web", True),
        ("app==web, tier=front", True),
        ("app=web,tier=back", False),
        ("app!=web", False),
        ("other!=x", True),
        ("app in (web, api)", True),
        ("app notin (web,api)", False),
        ("other notin (web)", True),
        ("app", True),
        ("!app", False),
        ("!other", True),
        ("mantle.dev/x=1,app in (a,web),!gone", True),
        ("empty=", True),
        ("empty in (,a)", True),
    ],
)
def test_what_a_selector_selects(text: str, holds: bool) -> None:
    selector = parse(text)
    assert isinstance(selector, Selector)
    assert selector.matches(LABELS) is holds


@pytest.mark.parametrize("text", ["=", "a=b=c", "a in b", "a=(x)", "a b", ",", "a=b,", "-a=b", "a=b c"])
def test_what_is_no_selector(text: str) -> None:
    assert isinstance(parse(text), BadSelector)
