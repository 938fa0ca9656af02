"""Label selectors as people type them (`app=web,tier!=db,env in (a,b),!old`), as in kubectl's `-l`. Pure.

Source: https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#label-selectors
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_KEY = r"(?:[a-z0-9](?:[-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?"
_VALUE = r"(?:[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?)?"
_FORMS = (
    re.compile(rf"(?P<key>{_KEY})\s*(?P<op>==|=|!=)\s*(?P<value>{_VALUE})"),
    re.compile(rf"(?P<key>{_KEY})\s+(?P<op>in|notin)\s*\((?P<values>[^()]*)\)"),
    re.compile(rf"(?P<op>!?)\s*(?P<key>{_KEY})"),
)


@dataclass(frozen=True, slots=True)
class Requirement:
    """One condition: the label `key` has (or, `negated`, has not) one of `values`; None: any value at all.

    As in Kubernetes, an object without the label meets every negated condition.
    """

    key: str
    values: frozenset[str] | None
    negated: bool

    def holds(self, labels: Mapping[str, str]) -> bool:
        there = self.key in labels and (self.values is None or labels[self.key] in self.values)
        return there != self.negated


@dataclass(frozen=True, slots=True)
class Selector:
    """Conditions that must all hold; none: everything."""

    requirements: tuple[Requirement, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.requirements)

    def matches(self, labels: Mapping[str, str]) -> bool:
        return all(requirement.holds(labels) for requirement in self.requirements)


EVERYTHING = Selector()


@dataclass(frozen=True, slots=True)
class BadSelector:
    """A text that is no selector: which part is not understood."""

    part: str

    def __str__(self) -> str:
        return f"the selector has {self.part!r}, which is not understood; write a=b, a!=b, a in (b,c), a or !a"


def parse(text: str) -> Selector | BadSelector:
    """The selector that `text` means; an empty text selects everything."""
    requirements = []
    for part in _parts(text):
        found = next((m for form in _FORMS if (m := form.fullmatch(part))), None)
        if found is None:
            return BadSelector(part)
        groups = found.groupdict()
        if (listed := groups.get("values")) is not None:
            values = frozenset(value.strip() for value in listed.split(","))
            if not all(re.fullmatch(_VALUE, value) for value in values):
                return BadSelector(part)
            requirements.append(Requirement(groups["key"], values, groups["op"] == "notin"))
        elif (value := groups.get("value")) is not None:
            requirements.append(Requirement(groups["key"], frozenset((value,)), groups["op"] == "!="))
        else:
            requirements.append(Requirement(groups["key"], None, groups["op"] == "!"))
    return Selector(tuple(requirements))


def _parts(text: str) -> list[str]:
    """The conditions, parted by the commas that are not inside parentheses."""
    if not text.strip():
        return []
    return [part.strip() for part in re.split(r",(?![^()]*\))", text)]
