"""How long commands take to start: prints the table of docs/commands.md. Run it on a quiet machine.

    python scripts/startup.py [--runs N]      N runs of each, one after the other (default 40)

The commands that ask are run against a socket that answers at once, so that only our side is measured.
"""

from __future__ import annotations

import argparse
import os
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


def main() -> None:
    parser = argparse.ArgumentParser(description="How long commands take to start.")
    parser.add_argument("--runs", type=int, default=40)
    runs = parser.parse_args().runs
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
