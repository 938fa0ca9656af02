"""Sets and removes annotations in YAML text and leaves every other byte alone: comments, quotes, order, odd spacing.

A YAML writer, even a round-tripping one, rewrites what it was not asked about. Here the text is only composed (parsed
with positions), and lines are inserted at the right place. The caller reads the result back and compares: what this
cannot do (it says so by KeyError) or does wrongly is then done by a writer. Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

Step = str | int


def annotate_text(text: str, path: Sequence[Step], annotations: Mapping[str, str]) -> str:
    """`text` with `metadata.annotations` of the object at `path` updated. KeyError if there is no such object."""
    quoted = text.lstrip().startswith("{")
    for name, value in annotations.items():
        text = _set(text, path, ("metadata", "annotations"), name, value, quoted)
    return text


def unannotate_text(text: str, path: Sequence[Step], names: Sequence[str]) -> str:
    """`text` without these annotations of the object at `path`: the inverse of `annotate_text`, to the byte.

    Where nothing else is left of `annotations` or `metadata`, they go, too. KeyError if there is no such annotation.
    """
    for name in names:
        text = _remove(text, path, ("metadata", "annotations", name))
    return text


def _remove(text: str, path: Sequence[Step], keys: Sequence[str]) -> str:
    from ruamel.yaml import YAML

    node = YAML(typ="rt", pure=True).compose(text)
    for step in path:
        node = _child(node, step)
    chain = [node]  # the mappings that lead to the key, outermost first
    for key in keys[:-1]:
        chain.append(_child(chain[-1], key))
    _child(chain[-1], keys[-1])
    depth = len(keys) - 1
    while depth > 0 and len(chain[depth].value) == 1:
        holder, empty = chain[depth - 1], chain[depth]
        if empty.flow_style and (not holder.flow_style or holder.value[-1][1] is not empty):
            break  # `{}` was there before: injection writes one only at the end of another
        depth -= 1
    return _cut(text, chain[depth], keys[depth])


def _cut(text: str, mapping: Any, key: str) -> str:
    """Without one entry of a mapping."""
    index = next(i for i, (name, _) in enumerate(mapping.value) if name.value == key)
    name, value = mapping.value[index]
    entries = mapping.value
    if mapping.flow_style:
        if index:
            return text[: entries[index - 1][1].end_mark.index] + text[value.end_mark.index :]
        end = entries[1][0].start_mark.index if len(entries) > 1 else value.end_mark.index
        return text[: name.start_mark.index] + text[end:]
    if index == 0 and len(entries) > 1:  # what stands before it (a list's dash, a comment) belongs to the next one
        return text[: name.start_mark.index] + text[entries[1][0].start_mark.index :]
    before = text.rfind("\n", 0, name.start_mark.index)
    after = _end_of_line(text, _last(mapping if index == len(entries) - 1 else value).end_mark.index)
    if before < 0:
        return text[after + 1 :]
    return text[:before] + text[after:]


def _set(text: str, path: Sequence[Step], below: Sequence[str], name: str, value: str, quoted: bool) -> str:
    """Sets one key, making the mappings that lead to it where they are missing."""
    from ruamel.yaml import YAML

    node = YAML(typ="rt", pure=True).compose(text)
    for step in path:
        node = _child(node, step)
    steps = [*below, name]
    for depth, step in enumerate(steps):
        found = _get(node, step)
        if found is None or (_is_null(found) and depth < len(steps) - 1):
            return _insert(text, node, found, steps[depth:], value, quoted)
        node = found
    return text[: node.start_mark.index] + _scalar(value, quoted) + text[node.end_mark.index :]


def _insert(text: str, mapping: Any, empty: Any, steps: Sequence[str], value: str, quoted: bool) -> str:
    """Adds the key `steps[0]` (holding the others, holding `value`) to a mapping; `empty` is its value, if null."""
    if empty is not None:
        raise KeyError(f"{steps[0]} is there without a value")
    inside = _scalar(value, quoted)
    if mapping.flow_style:
        for step in reversed(steps[1:]):
            inside = f"{{{_key(step, quoted)}: {inside}}}"
        entry = f"{_key(steps[0], quoted)}: {inside}"
        end = mapping.end_mark.index - 1  # the closing brace
        head = text[:end].rstrip()
        return head + (", " if mapping.value else "") + entry + text[len(head) : end] + text[end:]
    if not mapping.value:
        raise KeyError("an empty mapping has no place to write to")
    indent = mapping.value[0][0].start_mark.column
    lines = [f"{' ' * (indent + 2 * depth)}{_key(step, quoted)}:" for depth, step in enumerate(steps)]
    lines[-1] += f" {inside}"
    if steps[0] == "metadata":  # where people look for it: before the rest
        first = mapping.value[0][0].start_mark.index
        block = "\n".join(lines).lstrip(" ")
        return f"{text[:first]}{block}\n{' ' * indent}{text[first:]}"
    position = _end_of_line(text, _last(mapping).end_mark.index)
    return f"{text[:position]}\n" + "\n".join(lines) + text[position:]


def _child(node: Any, step: Step) -> Any:
    if isinstance(step, int):
        return node.value[step]
    found = _get(node, step)
    if found is None:
        raise KeyError(step)
    return found


def _get(node: Any, key: str) -> Any:
    """The value node of a key, None if the mapping does not have it."""
    if node is None or node.id != "mapping":
        raise KeyError(f"{key}: not inside a mapping")
    return next((value for name, value in node.value if name.value == key), None)


def _is_null(node: Any) -> bool:
    return bool(node.id == "scalar" and node.style is None and node.value in ("", "~", "null"))


def _last(node: Any) -> Any:
    """The node whose text ends a block collection (its own end mark lies after blank lines and comments)."""
    while node.id in ("mapping", "sequence") and not node.flow_style and node.value:
        node = node.value[-1][1] if node.id == "mapping" else node.value[-1]
    return node


def _end_of_line(text: str, index: int) -> int:
    """Where the line ends that holds the last character before `index` that is not white space."""
    index = len(text[:index].rstrip())
    newline = text.find("\n", index)
    return len(text) if newline < 0 else newline


def _key(text: str, quoted: bool) -> str:
    return json.dumps(text) if quoted else text


def _scalar(text: str, quoted: bool) -> str:
    """A string that no YAML reader takes for anything else."""
    plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9./_-]*", text) and text.lower() not in (
        "true",
        "false",
        "null",
        "yes",
        "no",
        "on",
        "off",
        "y",
        "n",
    )
    return text if plain and not quoted else json.dumps(text)
