"""Which ports `mantle port-forward` means."""

import click
import pytest

from mantle.cli.port_forward import _pair


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("80", (80, "80")),
        ("8080:80", (8080, "80")),
        (":80", (0, "80")),
        ("0:http", (0, "http")),
        ("http", (0, "http")),
    ],
)
def test_ports_as_people_type_them(text: str, meant: tuple[int, str]) -> None:
    assert _pair(text) == meant


@pytest.mark.parametrize("text", ["80:", "x:80", "70000:80", "80:70000", "0"])
def test_what_is_no_port_is_a_usage_error(text: str) -> None:
    with pytest.raises(click.UsageError, match="write PORT or LOCAL:PORT"):
        _pair(text)
