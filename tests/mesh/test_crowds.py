"""Ten thousand silent connections on each of a proxy's ports: little memory, nobody waits, refusals are counted."""

from __future__ import annotations

import contextlib
import http.client
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .apps import http_client, http_server
from .harness import WEB, Mesh, Pod, nobody_waits, wait_for

pytestmark = [pytest.mark.mesh, pytest.mark.root, pytest.mark.timeout(400)]

APPS = str(Path(__file__).with_name("apps.py"))
HTTP = 8080
SILENT, OTHER = 9100, 9101  # a port for each crowd: the last one's closed connections take up the kernel's ports
CROWD = 10_000
FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
"""What this machine allows: the crowd's own side needs files, too."""
KIB_EACH = 8
"""What one silent connection may cost at most, with everything that its protocol's detection holds for it."""


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory, mantle_proxy: Path) -> Iterator[Mesh]:
    quiet = {"LOG": "warn"}
    with Mesh(tmp_path_factory.mktemp("mesh"), mantle_proxy) as mesh:
        client, web = mesh.pair({80: HTTP, SILENT: SILENT}, also=[OTHER], env=quiet)
        mesh.pod("small", ports=[HTTP], files=1000, env=quiet)
        mesh.pod("plain", meshed=False)
        mesh.start()
        for port in (SILENT, OTHER):
            talk(web.spawn(sys.executable, APPS, "hold", str(port), stdout=-1))
        with http_server(web.listen(HTTP)), http_server(mesh.pods["small"].listen(HTTP)):
            assert answered(client)
            yield mesh


def talk(program: subprocess.Popen[bytes]) -> str:
    """The one line that a program of apps.py prints when it is ready."""
    assert program.stdout
    with program.stdout:
        return program.stdout.readline().decode().strip()


@contextlib.contextmanager
def crowd(pod: Pod, host: str, port: int, size: int) -> Iterator[None]:
    program = pod.spawn(sys.executable, APPS, "crowd", host, str(port), str(size), stdin=-1, stdout=-1)
    assert program.stdin
    with program.stdin:
        assert int(talk(program)) == size
        yield
    program.wait(120)


def answered(pod: Pod, host: str = WEB, port: int = 80) -> bool:
    """Makes one request on a connection of its own."""
    with http_client(pod.connect(host, port)) as connection:
        connection.request("GET", "/headers")
        response = connection.getresponse()
        return bool(response.read()) and response.status == 200


def memory_kib(pod: Pod) -> int:
    assert pod.proxy
    status = Path(f"/proc/{pod.proxy.pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


@pytest.mark.parametrize(
    ("who", "host", "port"),
    [
        ("client", WEB, SILENT),  # outbound: redirected to 4140, and on to the application
        ("plain", "10.203.0.3", OTHER),  # inbound: redirected to 4143
        ("plain", "10.203.0.3", 4143),  # links that never come
        ("plain", "10.203.0.3", 4190),
        ("plain", "10.203.0.3", 4191),
    ],
)
def test_a_silent_crowd_costs_little_and_delays_nobody(mesh: Mesh, who: str, host: str, port: int) -> None:
    client, web = mesh.pods["client"], mesh.pods["web"]
    assert web.ip == "10.203.0.3"
    size = min(CROWD, (FILES - 1000) // 2)  # inbound each has one to the application, too
    before = {pod.name: memory_kib(pod) for pod in (client, web)}
    with crowd(mesh.pods[who], host, port, size):
        nobody_waits(lambda: answered(client))
        nobody_waits(lambda: answered(mesh.pods["plain"], web.ip, HTTP))
        assert web.admin("/ready") == "ready\n"
        for pod in (client, web):
            grown = memory_kib(pod) - before[pod.name]
            assert grown < KIB_EACH * size, f"{pod.name}: {grown / size:.1f} KiB for each connection"
    nobody_waits(lambda: answered(client))
    for pod in (client, web):  # the next crowd comes when this one has left
        wait_for(lambda pod=pod: files_of(pod) < 200, "the crowd to leave", seconds=120)  # type: ignore[misc]


def files_of(pod: Pod) -> int:
    assert pod.proxy
    return len(list(Path(f"/proc/{pod.proxy.pid}/fd").iterdir()))


def test_a_crowd_beyond_the_file_limit_is_refused_at_once_counted_and_harms_no_link(mesh: Mesh) -> None:
    """`small` may open 1000 files."""
    client, small = mesh.pods["client"], mesh.pods["small"]
    assert answered(client, small.ip, HTTP)  # a link, and a connection to the application for the next one
    size = min(CROWD, FILES - 1000)
    with crowd(mesh.pods["plain"], small.ip, 4143, size):
        nobody_waits(lambda: answered(client, small.ip, HTTP))
        assert small.proxy and small.proxy.poll() is None
    # A thousand may stay, and some are told by the kernel. Where a crowd takes long to come, its first have been
    # given up for their silence before its last are here, and make room for as many.
    small.counts_at_least(size - 1500, "inbound_tcp_errors_total")
    small.counts_at_least(500, "inbound_tcp_errors_total", error="file_limit")
    wait_for(lambda: tried(mesh.pods["plain"], small.ip), "the proxy to take connections again", log=small.log)


def tried(pod: Pod, host: str) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        return answered(pod, host, HTTP)
    return False
