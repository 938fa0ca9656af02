"""The flags that say how proxies are set up: of one file's pods (`mantle inject`), and by default of every pod's
(`mantle install`, `upgrade`). One table, names as in the model system, its deprecated ones included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import click

from mantle.core.annotations import CONFIG

OPTIONS: Mapping[str, tuple[str, str]] = {
    "--opaque-ports": ("opaque-ports", "PORTS"),
    "--skip-inbound-ports": ("skip-inbound-ports", "PORTS"),
    "--skip-outbound-ports": ("skip-outbound-ports", "PORTS"),
    "--require-identity-on-inbound-ports": ("proxy-require-identity-inbound-ports", "PORTS"),
    "--default-inbound-policy": ("default-inbound-policy", "POLICY"),
    "--tls": ("tls", "MODE"),
    "--enable-debug-sidecar": ("enable-debug-sidecar", ""),
    "--enable-external-profiles": ("enable-external-profiles", ""),
    "--native-sidecar": ("proxy-enable-native-sidecar", ""),
    "--wait-before-exit-seconds": ("proxy-wait-before-exit-seconds", "SECONDS"),
    "--close-wait-timeout": ("close-wait-timeout", "SECONDS"),
    "--shutdown-grace-period": ("shutdown-grace-period", "DURATION"),
    "--access-log": ("access-log", "FORMAT"),
    "--inbound-port": ("inbound-port", "PORT"),
    "--outbound-port": ("outbound-port", "PORT"),
    "--control-port": ("control-port", "PORT"),
    "--admin-port": ("admin-port", "PORT"),
    "--proxy-image": ("proxy-image", "IMAGE"),
    "--proxy-version": ("proxy-version", "TAG"),
    "--debug-image": ("debug-image", "IMAGE"),
    "--image-pull-policy": ("image-pull-policy", "POLICY"),
    "--proxy-uid": ("proxy-uid", "UID"),
    "--proxy-gid": ("proxy-gid", "GID"),
    "--proxy-log-level": ("proxy-log-level", "FILTER"),
    "--proxy-cpu-request": ("proxy-cpu-request", "QUANTITY"),
    "--proxy-cpu-limit": ("proxy-cpu-limit", "QUANTITY"),
    "--proxy-memory-request": ("proxy-memory-request", "QUANTITY"),
    "--proxy-memory-limit": ("proxy-memory-limit", "QUANTITY"),
}
"""Flags that become a setting `config.mantle.dev/NAME`; those without a metavar are switches, `--FLAG` and
`--no-FLAG`."""
DEPRECATED: Mapping[str, str] = {"--proxy-cpu": "--proxy-cpu-request", "--proxy-memory": "--proxy-memory-request"}
"""Older names of flags."""
Settings = Mapping[str, "str | bool | None"]
"""Parameters of a command, by name."""


def proxy_options(*, without: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a command the flags; `without` are those that it has itself, with another meaning."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for old, use in DEPRECATED.items():
            function = click.option(old, hidden=True, callback=_deprecated(old, use))(function)
        for flag, (name, metavar) in reversed(list(OPTIONS.items())):
            about = CONFIG[name].help
            if flag in without:
                continue
            if metavar:
                function = click.option(flag, _parameter(flag), metavar=metavar, help=about)(function)
            else:
                both = f"{flag}/--no-{flag.removeprefix('--')}"
                function = click.option(both, _parameter(flag), default=None, help=about)(function)
        return function

    return decorate


def _parameter(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _deprecated(old: str, use: str) -> Callable[[click.Context, click.Parameter, str | None], str | None]:
    def callback(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
        if value is not None:
            click.echo(f"Flag {old} has been deprecated, use {use} instead", err=True)
        return value

    return callback


def given(parameters: Settings) -> Iterator[tuple[str, str, str]]:
    """Flag, setting and text of each that was given. A flag's own name wins over a deprecated one."""
    older = {use: parameters.get(_parameter(old)) for old, use in DEPRECATED.items()}
    for flag, (name, _) in OPTIONS.items():
        value = parameters.get(_parameter(flag))
        value = older.get(flag) if value is None else value
        if value is not None:
            yield flag, name, str(value).lower() if isinstance(value, bool) else str(value)
