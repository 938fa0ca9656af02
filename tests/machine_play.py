"""What the plays of `tests/machine` put into their pods: programs in Python and shell, and how long they may take."""

import os
import sys
from typing import Any

from mantle.platform.machine.spec import ContainerSpec, Role

PYTHON = os.path.realpath(sys.executable)
ECHO = """
import socket, threading
name = socket.gethostname()
def udp():
    u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.bind(("", 8080))
    while True:
        _, peer = u.recvfrom(100); u.sendto(name.encode(), peer)
threading.Thread(target=udp, daemon=True).start()
s = socket.create_server(("", 8080))
print("ready")
while True:
    c, peer = s.accept(); c.sendall((name + " " + peer[0]).encode()); c.close()
"""
"""Answers on port 8080: over TCP its name and the peer's address, over UDP its name."""
ASK = """
import os, socket, sys
def tcp(ip, port=8080, seconds=20):
    try:
        with socket.create_connection((ip, port), seconds) as c: return c.recv(100).decode()
    except OSError as e: return type(e).__name__ + " " + str(e.errno)
def udp(ip, port=8080):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as u:
        u.settimeout(20); u.connect((ip, port)); u.send(b"?")
        try: return u.recv(100).decode()
        except OSError as e: return type(e).__name__ + " " + str(e.errno)
"""
PATIENCE = 120.0
"""Seconds after which a test gives up on what should come at once: the machine may be busy with other tests."""
IDLE = "import signal; print('ready'); signal.sigwait([signal.SIGTERM])"


def shell(name: str, script: str, **more: Any) -> ContainerSpec:
    """A container that runs a script of the shell."""
    more.setdefault("role", Role.APP)
    return ContainerSpec(name, argv=("/bin/sh", "-c", script), env={"PATH": "/usr/bin:/bin"}, **more)


def python(name: str, code: str, **more: Any) -> ContainerSpec:
    """A container that runs Python code."""
    more.setdefault("role", Role.APP)
    env = {"PYTHONUNBUFFERED": "1", "PATH": "/usr/bin:/bin", **more.pop("env", {})}
    return ContainerSpec(name, argv=(PYTHON, "-c", code), env=env, **more)
