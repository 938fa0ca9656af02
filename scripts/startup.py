"""How long commands take to start: prints the tables of docs/commands.md. Run it on a quiet machine.

    python scripts/startup.py [--runs N]      N runs of each, one after the other (default 40)
    python scripts/startup.py --cluster NAME  against a cluster, by its context, with Mantle and emojivoto in it

The commands that ask a mesh of this machine are run against a socket that answers at once, so that only our side is
measured. Those that ask a cluster wait for it; the CPU time of the command itself is told beside that.
"""

from __future__ import annotations

import argparse
import os
import resource
import socketserver
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

COMMANDS = (
    ("mantle version --client", 80),
    ("mantle --help", 80),
    ("mantle edges deploy -n emojivoto", 150),
    ("mantle stat deploy -n emojivoto", 150),
    ("mantle ps", 150),
)
ON_A_CLUSTER = (
    "mantle version",
    "mantle edges deploy -n emojivoto",
    "mantle stat deploy -n emojivoto",
    "mantle check",
    "mantle check --proxy",
)
PROGRAM = "import sys\nfrom mantle.cli import machine_client, main\nfrom pathlib import Path\n"


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b'{"edges": [], "rows": [], "pods": [], "services": [], "mesh": "default"}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def milliseconds(command: str, root: str, runs: int) -> list[float]:
    words = command.split()[1:]
    program = f"{PROGRAM}machine_client.state_root = lambda: Path({root!r})\nsys.argv[1:] = {words!r}\nmain.main()"
    direct = [str(Path(sys.executable).with_name("mantle")), *words]
    argv = direct if words[0] in ("version", "--help") else [sys.executable, "-c", program]
    times = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        done = subprocess.run(argv, capture_output=True, text=True, check=False, env={**os.environ, "MANTLE_MESH": ""})
        times.append((time.perf_counter() - began) * 1000)
        if done.returncode != 0:
            raise SystemExit(f"{command}: {done.stderr}")
    return times[1:]  # the first one filled the caches


def on_a_cluster(context: str, runs: int) -> None:
    """Prints the table of the commands that ask a cluster."""
    print("| command | minimum | median | CPU time, minimum |\n|---|---|---|---|")
    program = str(Path(sys.executable).with_name("mantle"))
    for command in ON_A_CLUSTER:
        walls, busy = [], []
        for _ in range(runs):
            used, began = _used(), time.perf_counter()
            argv = [program, "--context", context, *command.split()[1:]]
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
            walls.append((time.perf_counter() - began) * 1000)
            busy.append((_used() - used) * 1000)
            if done.returncode != 0:
                raise SystemExit(f"{command}: {done.stdout}{done.stderr}")
        print(f"| `{command}` | {min(walls):.0f} ms | {statistics.median(walls):.0f} ms | {min(busy):.0f} ms |")


def _used() -> float:
    """CPU seconds of the children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description="How long commands take to start.")
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--cluster", metavar="CONTEXT")
    arguments = parser.parse_args()
    runs = arguments.runs
    if arguments.cluster:
        on_a_cluster(arguments.cluster, runs)
        return
    with tempfile.TemporaryDirectory() as root:
        directory = Path(root, "default")
        directory.mkdir()
        with socketserver.ThreadingUnixStreamServer(str(directory / "api.sock"), Answer) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            print("| command | minimum | median | allowed |\n|---|---|---|---|")
            for command, allowed in COMMANDS:
                times = milliseconds(command, root, runs)
                print(f"| `{command}` | {min(times):.0f} ms | {statistics.median(times):.0f} ms | {allowed} ms |")
            server.shutdown()


if __name__ == "__main__":
    main()
