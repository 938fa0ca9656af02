"""The reason words are the same in both programs."""

import re
from enum import StrEnum
from pathlib import Path

import pytest

from mantle.core import reasons

RUST = Path(__file__).resolve().parents[2] / "proxy" / "core" / "src" / "reasons.rs"


def rust_enums() -> dict[str, list[str]]:
    """Every `reasons! { Name { Variant = "label", … } }` of the Rust file, labels in order."""
    found = {}
    for block in re.findall(r"^reasons! \{\n(.*?)^\}", RUST.read_text(), flags=re.M | re.S):
        name = re.search(r"^\s*(\w+) \{", block, flags=re.M)
        assert name is not None, block
        found[name.group(1)] = re.findall(r'^\s*\w+ = "([^"]+)",', block, flags=re.M)
    return found


def test_the_rust_file_is_read_at_all() -> None:
    assert len(rust_enums()) >= 5
    assert "loopback" in rust_enums()["NoTls"]


@pytest.mark.parametrize("enum", reasons.SHARED_WITH_THE_PROXY, ids=lambda enum: enum.__name__)
def test_both_programs_have_the_same_words(enum: type[StrEnum]) -> None:
    assert [member.value for member in enum] == rust_enums()[enum.__name__]


def test_no_enum_of_the_proxy_is_missing_here() -> None:
    assert {enum.__name__ for enum in reasons.SHARED_WITH_THE_PROXY} == set(rust_enums())


def test_labels_are_words() -> None:
    enums = [e for e in vars(reasons).values() if isinstance(e, type) and issubclass(e, StrEnum) and e is not StrEnum]
    assert len(enums) > 8
    for enum in enums:
        for member in enum:
            assert re.fullmatch(r"[a-z]+(_[a-z]+)*", member.value), member
