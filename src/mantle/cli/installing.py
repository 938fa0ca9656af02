"""What `install` and `upgrade` share: the flags that are values, and reading them with every mistake at once.

Later wins: what the mesh was installed with (`upgrade`), files in order, `--set` in order, then the flags with a name
of their own. Asks no cluster.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mantle.cli import proxy_options
from mantle.cli.output import Failure, Problem

if TYPE_CHECKING:
    from mantle.manifests.config import InstallValues

TRUST_FILES = (
    ("--identity-trust-anchors-file", "The trust roots to install with (PEM)."),
    ("--identity-issuer-certificate-file", "The issuer's certificate, intermediates after it (PEM)."),
    ("--identity-issuer-key-file", "The issuer's private key (PEM, P-256)."),
)


def value_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The flags that set values."""
    function = proxy_options.proxy_options(without=("--tls",))(function)
    for option in reversed(
        (
            click.option(
                "-f", "--values", "files", metavar="FILE", multiple=True, help="Values from YAML; repeatable."
            ),
            click.option("--set", "sets", metavar="KEY=VALUE", multiple=True, help="One value, as a.b=c; repeatable."),
            click.option("--ha", is_flag=True, help="Three pods of everything, with disruption budgets."),
            click.option("--registry", metavar="NAME", help="Registry, with path, that stands before every image."),
            click.option(
                "--tls", type=click.Choice(["required", "optional"]), help="optional: the experimental mode, weaker."
            ),
            click.option("--identity-trust-domain", metavar="NAME", help="What identities end in (cluster.local)."),
            click.option(
                "--identity-issuance-lifetime", metavar="DURATION", help="How long a certificate lasts (24h)."
            ),
            click.option("--identity-clock-skew-allowance", metavar="DURATION", help="Added at both its ends (20s)."),
            click.option("--identity-external-issuer", is_flag=True, help="Somebody else makes the issuer's Secret."),
        )
    ):
        function = option(function)
    return function


FLAGS: Mapping[str, str] = {
    "ha": "ha",
    "registry": "registry",
    "tls": "tls",
    "identity_trust_domain": "trustDomain",
    "identity_issuance_lifetime": "identity.issuanceLifetime",
    "identity_clock_skew_allowance": "identity.clockSkewAllowance",
    "identity_external_issuer": "identity.externalIssuer",
}
"""Flags (parameter names) that are values, with their path."""
OF_THE_MESH: Mapping[str, str] = {"--image-pull-policy": "imagePullPolicy"}
"""Flags of proxies that mean the control plane's own pods, too."""


def read_all(
    stored: Mapping[str, Any],
    files: Sequence[str],
    sets: Sequence[str],
    flags: Mapping[str, Any],
    namespace: str | None,
) -> tuple[dict[str, Any], InstallValues]:
    """Everything that was given, as one nested mapping, and the values it makes.

    Raises `Failure` with every mistake: files that cannot be read and values that are not accepted alike.
    """
    from mantle.manifests.config import PROXY, BadValues, load, merge, put

    problems: list[Problem] = []
    given = merge({}, stored)
    for name in files:
        given = merge(given, read_values(name, problems))
    for text in sets:
        for path, value in parse_set(text, problems):
            put(given, path, value)
    for parameter, path in FLAGS.items():
        if flags.get(parameter) not in (None, False):
            put(given, path, flags[parameter])
    paths = {setting.name: path for path, setting in PROXY.items()}
    for flag, name, text in proxy_options.given({key: flags[key] for key in flags if key not in FLAGS}):
        put(given, OF_THE_MESH.get(flag, paths[name]), text)
    if namespace is not None:
        put(given, "controlNamespace", namespace)
    try:
        values = load(given)
    except BadValues as bad:
        problems += [Problem(f"value {f.path}: found {f.found}", f"use {f.accepted}") for f in bad.faults]
    if problems:
        raise Failure.of(problems)
    return given, values


def read_values(name: str, problems: list[Problem]) -> dict[str, Any]:
    """A values file: one YAML mapping. What is wrong with it goes to `problems`."""
    import sys

    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    fix = "give --values a YAML file such as:  proxy: {logLevel: debug}"
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
        content = YAML(typ="safe", pure=True).load(text)
    except OSError as error:
        problems.append(Problem(f"cannot read {name}: {error.strerror}", fix))
        return {}
    except (YAMLError, UnicodeDecodeError) as error:
        problems.append(Problem(f"{name} is not YAML: {' '.join(str(error).split())}", fix))
        return {}
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        problems.append(Problem(f"{name}: found {type(content).__name__}, wanted names with values", fix))
        return {}
    return content


def parse_set(text: str, problems: list[Problem]) -> list[tuple[str, Any]]:
    """`a.b=c,d={1,2}` as paths and values. A comma in a value is `\\,`, or just a comma where no `name=` follows it."""
    pairs: list[tuple[str, str]] = []
    for part in re.split(r"(?<!\\),(?![^{]*\})", text):
        name, equals, value = part.partition("=")
        if equals and re.fullmatch(r"[A-Za-z][A-Za-z0-9.]*", name.strip()):
            pairs.append((name.strip(), value))
        elif pairs and not equals:
            pairs[-1] = (pairs[-1][0], f"{pairs[-1][1]},{part}")
        else:
            problems.append(Problem(f"--set {part!r} is not KEY=VALUE", "write --set proxy.logLevel=debug"))
    return [(name, _set_value(value)) for name, value in pairs]


def _set_value(text: str) -> Any:
    plain = text.replace("\\,", ",")
    if plain.startswith("{") and plain.endswith("}"):
        return [item.strip() for item in plain[1:-1].split(",") if item.strip()]
    return plain


def read_trust_files(names: Sequence[str | None]) -> list[bytes | None]:
    """The contents of the files of `TRUST_FILES` that were named; a `Failure` with all that cannot be read."""
    problems: list[Problem] = []
    contents: list[bytes | None] = []
    for (flag, _), name in zip(TRUST_FILES, names, strict=True):
        try:
            contents.append(Path(name).read_bytes() if name else None)
        except OSError as error:
            problems.append(Problem(f"{flag}: cannot read {name}: {error.strerror}", "name a PEM file"))
            contents.append(None)
    if problems:
        raise Failure.of(problems)
    return contents
