"""The router's addresses, from a pod's own files."""

from __future__ import annotations

from pathlib import Path

from mantle.viz.router import gateways, name_servers, router_addresses

ROUTES = """\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t0100CB0A\t0003\t0\t0\t0\t00000000\t0\t0\t0
eth0\t0000FEA9\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0
"""


def test_default_gateways_are_found() -> None:
    assert gateways(ROUTES) == ["10.203.0.1"]
    assert gateways("") == gateways("Iface\nshort line\n") == []


def test_name_servers_are_found() -> None:
    assert name_servers("search a\nnameserver 10.203.0.1 # x\nnameserver nonsense\nnameserver fd00::1\n") == [
        "10.203.0.1",
        "fd00::1",
    ]


def test_both_files_together_and_none(tmp_path: Path) -> None:
    (tmp_path / "resolv.conf").write_text("nameserver 10.203.0.1\nnameserver 10.203.0.53\n")
    (tmp_path / "route").write_text(ROUTES)
    assert router_addresses(tmp_path / "resolv.conf", tmp_path / "route") == ("10.203.0.1", "10.203.0.53")
    assert router_addresses(tmp_path / "no", tmp_path / "file") == ()
