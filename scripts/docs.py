"""Keeps the generated parts of docs/ true: tables from the code that decides, help texts from the commands themselves.

    python scripts/docs.py            (`make gen`) rewrites the regions
    python scripts/docs.py --check    (`make lint`) says which pages would change, and changes nothing

A region stands between `<!-- generated: NAME -->` and `<!-- end -->`; NAME is one of `TABLES` or
`help COMMAND`.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REGION = re.compile(r"(?ms)^<!-- generated: ([^>]+?) -->\n.*?^<!-- end -->$")


def annotations() -> str:
    """The table of `config.mantle.dev/*`, from `core/annotations.py`."""
    from mantle.core.annotations import CONFIG, PREFIX

    rows = [
        f"| `{PREFIX}{s.name}` | {s.help} | {_cell(s.accepted)} | {'yes' if s.inherited else 'no'} |"
        for s in CONFIG.values()
    ]
    head = "| annotation | what it does | accepted | inherited from the namespace |\n|---|---|---|---|\n"
    return head + "\n".join(rows)


def reasons() -> str:
    """Every reason word: the proxy's with their meaning from `reasons.rs`, then the control plane's own."""
    parts = []
    rust = (ROOT / "proxy/core/src/reasons.rs").read_text()
    for block in re.findall(r"(?ms)^reasons! \{\n(.*?)^\}", rust):
        name = re.search(r"(?m)^ {4}(\w+) \{", block)
        assert name, "a reasons! block without a name"
        about = _rust_doc(block[: name.start()])
        rows = re.findall(r'((?:^ {8}///.*\n)*)^ {8}\w+ = "(\w+)",', block, re.M)
        parts.append(_section(name[1], about, {label: _rust_doc(doc) for doc, label in rows}))
    tree = ast.parse((ROOT / "src/mantle/core/reasons.py").read_text())
    for enum in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        if f"{enum.name} {{" in rust:
            continue
        parts.append(_section(enum.name, ast.get_docstring(enum) or "", _python_members(enum)))
    return "\n\n".join(parts)


def _python_members(enum: ast.ClassDef) -> dict[str, str]:
    members: dict[str, str] = {}
    label = ""
    for node in enum.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            label = str(node.value.value)
            members[label] = ""
        elif label and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            members[label] = " ".join(str(node.value.value).split())
    return members


def _rust_doc(text: str) -> str:
    return " ".join(line.strip().removeprefix("///").strip() for line in text.splitlines() if "///" in line)


def _section(name: str, about: str, members: Mapping[str, str]) -> str:
    rows = "\n".join(f"| `{label}` | {_cell(meaning)} |" for label, meaning in members.items())
    return f"### {about.rstrip('.')}\n\n`{name}`\n\n| word | meaning |\n|---|---|\n{rows}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def help_of(command: str) -> str:
    """What `mantle COMMAND --help` prints."""
    from click.testing import CliRunner

    from mantle.cli.main import cli

    result = CliRunner().invoke(cli, [*command.split(), "--help"], prog_name="mantle", terminal_width=100)
    if result.exit_code != 0:
        raise SystemExit(f"mantle {command} --help failed: {result.output or result.exception!r}")
    return f"```text\n{result.output.rstrip()}\n```"


def commands() -> str:
    """The commands, as `mantle --help` lists them."""
    from mantle.cli.main import COMMANDS

    rows = [f"| `mantle {name}` | {about} |" for name, (_, about) in COMMANDS.items()]
    return "| command | what it does |\n|---|---|\n" + "\n".join(rows)


def values() -> str:
    """The values of `mantle install`, from `manifests/config.py`."""
    from mantle.manifests.config import VALUES, InstallValues

    rows = []
    for value in VALUES:
        default = getattr(InstallValues(), value.field)
        spelled = ", ".join(default) if isinstance(default, tuple) else _default(default)
        if value.path == "version":
            spelled = "this version"
        rows.append(f"| `{value.path}` | {_cell(value.help)} | {_cell(value.accepted)} | {spelled} |")
    return "| value | what it does | accepted | default |\n|---|---|---|---|\n" + "\n".join(rows)


def _default(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def proxy_values() -> str:
    """Each `proxy.NAME` with its annotation."""
    from mantle.core.annotations import PREFIX
    from mantle.manifests.config import PROXY

    rows = [f"| `{path}` | `{PREFIX}{setting.name}` |" for path, setting in PROXY.items()]
    return "| value | annotation |\n|---|---|\n" + "\n".join(rows)


TABLES: Mapping[str, Callable[[], str]] = {
    "annotations": annotations,
    "commands": commands,
    "proxy values": proxy_values,
    "reasons": reasons,
    "values": values,
}


def _generate(match: re.Match[str]) -> str:
    name = match[1]
    body = help_of(name.removeprefix("help ")) if name.startswith("help ") else TABLES[name]()
    return f"<!-- generated: {name} -->\n{body}\n<!-- end -->"


def main() -> None:
    stale = []
    for page in sorted((ROOT / "docs").glob("*.md")):
        text = page.read_text()
        made = REGION.sub(_generate, text)
        if made != text:
            stale.append(page.name)
            if "--check" not in sys.argv[1:]:
                page.write_text(made)
    if stale and "--check" in sys.argv[1:]:
        raise SystemExit(f"generated parts of docs/ are out of date: {', '.join(stale)}; run `make gen`")


if __name__ == "__main__":
    main()
