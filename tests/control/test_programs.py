"""The control plane's programs as processes: flags, readiness, shutdown."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from discovery_play import MESH
from free_ports import free_port

from mantle.core.ca import make_trust


@pytest.fixture
def files(tmp_path: Path) -> Path:
    trust = make_trust(MESH.names, datetime.now(UTC), (secrets.token_bytes(16), secrets.token_bytes(16)))
    (tmp_path / "crt.pem").write_bytes(trust.issuer_pem)
    (tmp_path / "key.pem").write_bytes(trust.issuer_key_pem)
    (tmp_path / "roots.pem").write_bytes(trust.roots_pem)
    return tmp_path


def arguments(program: str, files: Path, admin: int) -> list[str]:
    common = [program, "--listen=127.0.0.1:0", f"--admin=127.0.0.1:{admin}", f"--platform=unix:{files}/platform.sock"]
    if program == "identity":
        return [*common, f"--issuer={files}", f"--trust-roots={files}/roots.pem", "--issuance-lifetime=5s"]
    return [*common, "--policy-listen=127.0.0.1:0", "--networks=10.203.0.0/16"]


@contextmanager
def started(*args: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "mantle.control_plane", *args]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        try:
            yield process
        finally:
            process.kill()


def status(port: int, path: str) -> tuple[int, str]:
    """The admin server's answer; waits for there to be one."""
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError:
            assert time.monotonic() < deadline, f"nothing listens on {port}"
            time.sleep(0.05)


@pytest.mark.parametrize(
    ("program", "ready", "metric"),
    [
        ("identity", (200, "ready\n"), "issuer_cert_ttl_seconds"),
        ("destination", (503, "no word from the platform"), "mantle_discovery_streams"),
    ],
)
def test_a_program_says_whether_it_is_ready_and_ends_when_told(
    files: Path, program: str, ready: tuple[int, str], metric: str
) -> None:
    admin = free_port()
    with started(*arguments(program, files, admin)) as process:
        assert status(admin, "/live") == (200, "live\n")
        code, text = status(admin, "/ready")
        assert code == ready[0] and ready[1] in text
        assert f"\n{metric} " in status(admin, "/metrics")[1]
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        soft, hard = re.findall(r"Max open files +(\d+) +(\d+)", limits)[0]
        assert program == "identity" or soft == hard, "one stream per connection meets this limit first"
        steps_back = os.getpriority(os.PRIO_PROCESS, process.pid) - os.getpriority(os.PRIO_PROCESS, 0)
        assert steps_back == (10 if program == "identity" else 0), "signing must not make discovery wait"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_identity_without_an_issuer_says_what_is_missing(files: Path) -> None:
    (files / "key.pem").unlink()
    admin = free_port()
    with started(*arguments("identity", files, admin)):
        code, text = status(admin, "/ready")
        assert code == 503 and "issuer_not_ready" in text and "key.pem" in text


def test_a_port_in_use_is_an_error_at_once(files: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with started(*arguments("destination", files, free_port())[:1], f"--listen=127.0.0.1:{port}") as process:
            assert process.wait(60) == 1
            assert process.stderr is not None and str(port) in process.stderr.read()


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        ["nonsense"],
        ["destination", "--listen=here"],
        ["destination", "--default-inbound-policy=open"],
        ["destination", "--networks=10.0.0.1/8"],
        ["destination", "--trust-domain=-x"],
        ["destination", "--platform=/run/p.sock"],
        ["identity", "--trust-roots=/x"],
        ["identity", "--issuer=/x", "--trust-roots=/x", "--issuance-lifetime=10"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(wrong: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mantle.control_plane", *wrong], stderr=subprocess.PIPE, timeout=60, check=False
    )
    assert done.returncode == 2 and done.stderr
