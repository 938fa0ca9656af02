"""vote-bot: asks web for the list and votes, REQUEST_RATE times a second, over one kept-alive HTTP/1.1 connection.

WEB_HOST (`web-svc.emojivoto:80`) is where it connects and, port included, its Host header; HOST_OVERRIDE replaces the
header, TTL ends it after so many seconds. It says what it votes for before it does, and does not mind HTTP errors.
"""

from __future__ import annotations

import http.client
import json
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from urllib.parse import quote

from mantle_emojivoto.emojis import DOUGHNUT

DOUGHNUT_SHARE = 0.15
TIMEOUT_SECONDS = 10.0


def choose(shortcodes: Sequence[str], chance: float, pick: Callable[[Sequence[str]], str]) -> str:
    """The doughnut in 15 of 100 cases, else any emoji alike. `chance` is from 0 to 1."""
    return DOUGHNUT if chance < DOUGHNUT_SHARE else pick(shortcodes)


def vote(connection: http.client.HTTPConnection, host_header: str) -> None:
    """One round: list, choose, vote. Raises OSError or http.client.HTTPException if web cannot be asked."""
    headers = {"Host": host_header, "User-Agent": "emojivoto-vote-bot"}
    connection.request("GET", "/api/list", headers=headers)
    response = connection.getresponse()
    body = response.read()
    if response.status != 200:
        print(f"web answered the list with {response.status}", file=sys.stderr, flush=True)
        return
    choice = choose([item["shortcode"] for item in json.loads(body)], random.random(), random.choice)
    print(f"✔ Voting for {choice}", flush=True)
    connection.request("GET", f"/api/vote?choice={quote(choice, safe=':')}", headers=headers)
    connection.getresponse().read()


def main(environment: Mapping[str, str]) -> None:
    web_host = environment["WEB_HOST"]
    host_header = environment.get("HOST_OVERRIDE") or web_host
    pause = 1 / float(environment.get("REQUEST_RATE") or "1")
    deadline = time.monotonic() + float(environment["TTL"]) if environment.get("TTL") else None
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    connection = http.client.HTTPConnection(web_host, timeout=TIMEOUT_SECONDS)
    while not stop.is_set() and (deadline is None or time.monotonic() < deadline):
        try:
            vote(connection, host_header)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            print(f"cannot ask {web_host}: {error!r}", file=sys.stderr, flush=True)
        stop.wait(pause)
    connection.close()
