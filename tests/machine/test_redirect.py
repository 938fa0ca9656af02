"""The redirect in a network namespace as a dual-stack pod has it: both families are tried, half of it is never left."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from machine_play import PATIENCE

pytestmark = [
    pytest.mark.root,
    pytest.mark.mesh,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes a network namespace with links of its own"),
]


@pytest.fixture
def dual_stack(program: Any) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Runs a shell's command in a namespace of its own with an IPv4 and an IPv6 address and routes, as a pod has."""
    ip = program("ip")
    lines = [
        "link set lo up",
        "link add d0 type veth peer name d1",
        "link set d0 up",
        "link set d1 up",
        "addr add 10.9.0.2/24 dev d0",
        "-6 addr add fd00::2/64 dev d0 nodad",
        "route add default dev d0",
        "-6 route add default dev d0",
    ]
    links = "set -e\n" + "\n".join(f"{ip} {line}" for line in lines)

    def run(command: str) -> subprocess.CompletedProcess[str]:
        words = ["unshare", "--net", "sh", "-c", f"{links}\n{command}"]
        return subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE)

    return run


def test_both_families_are_redirected_and_tried(mantle_proxy: Path, dual_stack: Any) -> None:
    done = dual_stack(f"{mantle_proxy} redirect install --proxy-uid 2102")
    assert done.returncode == 0, done.stderr
    for target in ("192.0.2.1:65535", "[2001:db8::1]:65535"):
        assert f"a connection to {target} was redirected, its original destination known" in done.stdout


@pytest.mark.parametrize("loopback", ["127.0.0.1", "::1"])
def test_a_redirect_that_does_not_work_fails_the_pod_and_leaves_no_rule(
    mantle_proxy: Path, dual_stack: Any, loopback: str
) -> None:
    """Somebody holds the proxy's port and serves nobody: the rules can be set, and lead nowhere, in one family."""
    code = """
import socket, subprocess, sys
proxy, loopback = sys.argv[1:]
held = socket.socket(socket.AF_INET6 if ":" in loopback else socket.AF_INET)
held.bind((loopback, 4140))
for verb in ("install", "verify"):
    done = subprocess.run([proxy, "redirect", verb, "--proxy-uid", "2102"], capture_output=True, text=True)
    print(verb, done.returncode, done.stderr.strip())
"""
    done = dual_stack(shlex.join([sys.executable, "-I", "-c", code, str(mantle_proxy), loopback]))
    assert done.returncode == 0, done.stderr
    installed, left = done.stdout.splitlines()
    target = "[2001:db8::1]:65535" if ":" in loopback else "192.0.2.1:65535"
    assert installed.startswith("install 1 ") and f"a connection to {target}: " in installed
    assert left.startswith("verify 1 ") and "the redirect is not installed" in left
