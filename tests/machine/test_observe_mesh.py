"""Every command of the pages that promise them, against a live mesh with emojivoto and a client outside the mesh.

The lines are checked to the byte where they are fixed, by pattern where an address, an id or a time stands. `tests/cli`
checks the same formats with the pages' own values.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mantle.cli.machine_client import state_root

pytestmark = [pytest.mark.root, pytest.mark.mesh, pytest.mark.slow, pytest.mark.timeout(500)]

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = """\
apiVersion: v1
kind: Pod
metadata: {name: curl, annotations: {mantle.dev/inject: disabled}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: curl
      image: python
      args:
        - -c
        - |
          import time, urllib.request
          while True:
              urllib.request.urlopen("http://web-svc.emojivoto/api/list", timeout=60).read()
              time.sleep(0.2)
"""
IMAGES = f"images: {{python: {{command: [{sys.executable}]}}}}\n"

ENDS = r"src=[\d.]+:\d+ dst=[\d.]+:\d+"
OUT, IN = rf"req id=\d+:\d+ proxy=out {ENDS} tls=true", rf"req id=\d+:\d+ proxy=in  {ENDS} tls=true"
LIST = r":method=GET :authority=web-svc\.emojivoto:80 :path=/api/list"
LIST_ALL = r":method=POST :authority=emoji-svc\.emojivoto:8080 :path=/emojivoto\.v1\.EmojiService/ListAll"
EMOJIVOTO_LINES = [
    f"{OUT} {LIST}",
    f"{IN} {LIST}",
    f"{OUT} {LIST_ALL}",
    f"{IN} {LIST_ALL}",
    rf"rsp id=\d+:\d+ proxy=in  {ENDS} tls=true :status=200 latency=\d+µs",
    rf"end id=\d+:\d+ proxy=in  {ENDS} tls=true duration=\d+µs response-length=\d+B",
    rf"end id=\d+:\d+ proxy=out {ENDS} tls=true grpc-status=OK duration=\d+µs response-length=\d+B",
]
PROBE = rf"id=\d+:\d+ proxy=in  {ENDS} tls=not_provided_by_remote"
CONTROL_LINES = [
    rf"req {PROBE} :method=GET :authority=[\d.]+:\d+ :path=/ready",
    rf"rsp {PROBE} :status=200 latency=\d+µs",
    rf"end {PROBE} duration=\d+µs response-length=\d+B",
    rf"{IN} :method=GET :authority=[\d.]+:9996 :path=/metrics",
    rf"rsp id=\d+:\d+ proxy=in  {ENDS} tls=true :status=200 latency=\d+µs",
    rf"end id=\d+:\d+ proxy=in  {ENDS} tls=true duration=\d+µs response-length=\d+B",
]
LOOK_BACK = 320.0
"""Seconds: `edges` forgets after five minutes what was different while things started."""
WHICH = b"mesh m on this machine\n"
"""What a view says on standard error, and nothing else."""
EDGES = """\
SRC          DST        CLIENT              SERVER              MSG
pod/curl     web        -                   -                   not_provided_by_remote
vote-bot     web        default.emojivoto   web.emojivoto       -
web          emoji      web.emojivoto       emoji.emojivoto     -
web          voting     web.emojivoto       voting.emojivoto    -
mantle-viz   emoji      mantle-viz.mantle   emoji.emojivoto     -
mantle-viz   vote-bot   mantle-viz.mantle   default.emojivoto   -
mantle-viz   voting     mantle-viz.mantle   voting.emojivoto    -
mantle-viz   web        mantle-viz.mantle   web.emojivoto       -
"""
STAT = [
    r"NAME                        MESHED   SUCCESS      RPS   LATENCY_P50   LATENCY_P95   LATENCY_P99    TLS",
    r"emoji-svc\.emojivoto:8080         - +\d+\.\d\d% +\d+\.\drps +\d+ms +\d+ms +\d+ms   100%",
    r"voting-svc\.emojivoto:8080        - +\d+\.\d\d% +\d+\.\drps +\d+ms +\d+ms +\d+ms   100%",
    r"web-svc\.emojivoto:80             - +\d+\.\d\d% +\d+\.\drps +\d+ms +\d+ms +\d+ms   100%",
]


async def start(*words: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    argv = [sys.executable, "-m", "mantle", *words]
    return await asyncio.create_subprocess_exec(*argv, stdout=pipe, stderr=pipe, stdin=asyncio.subprocess.DEVNULL)


async def mantle(line: str, code: int = 0) -> str:
    """What a command prints on standard output; `code` is the exit code it must have."""
    process = await start(*line.split())
    out, err = await process.communicate()
    assert process.returncode == code, f"mantle {line}: {process.returncode}\n{out.decode()}\n{err.decode()}"
    return out.decode()


async def until(what: str, said: Callable[[], Awaitable[str]], seconds: float = LOOK_BACK) -> str:
    """Asks again until the answer is `what`, which it then returns; else fails with the last answer."""
    end = time.monotonic() + seconds
    while (answer := await said()) != what:
        assert time.monotonic() < end, f"wanted:\n{what}\nlast answer:\n{answer}"
        await asyncio.sleep(0.3)
    return answer


async def tapped(line: str, wanted: Iterable[str]) -> None:
    """A tap shows a line of each pattern in time, and Ctrl-C then ends it without a word."""
    missing = {pattern: re.compile(pattern) for pattern in wanted}
    process = await start(*line.split())
    assert process.stdout and process.stderr
    seen: list[str] = []
    try:
        async with asyncio.timeout(180):
            while missing:
                text = (await process.stdout.readline()).decode().removesuffix("\n")
                assert text, f"mantle {line} ended: {(await process.stderr.read()).decode()}"
                seen.append(text)
                missing = {pattern: regex for pattern, regex in missing.items() if not regex.fullmatch(text)}
    except TimeoutError:
        pytest.fail(f"mantle {line} did not show {list(missing)}, only:\n" + "\n".join(seen))
    process.send_signal(signal.SIGINT)
    _, errors = await process.communicate()
    assert (process.returncode, errors) == (0, WHICH)


@asynccontextmanager
async def emojivoto() -> AsyncIterator[None]:
    """A mesh with emojivoto, and beside it a client that has no proxy."""
    home = state_root().parent / "app"
    home.mkdir(parents=True)
    (home / "outside.yml").write_text(OUTSIDE)
    (home / "mantle.images.yml").write_text(IMAGES)
    files = f"{ROOT}/apps/emojivoto/emojivoto.yml {home}/outside.yml --images {home}/mantle.images.yml"
    await mantle(f"--mesh m up -d --timeout 300 {files}")
    yield
    await mantle("down")


async def open_taps() -> str:
    ask = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9995/metrics').read().decode())"
    process = await start("exec", "-n", "mantle", "deploy/mantle-viz", "-c", "viz", "--", "python3", "-c", ask)
    out, _ = await process.communicate()
    return next(line for line in out.decode().splitlines() if line.startswith("mantle_viz_open_taps "))


def test_what_the_pages_promise(host: Any, mantle_proxy: Path) -> None:
    async def scene() -> None:
        async with emojivoto():
            await until(EDGES, lambda: mantle("edges deployment -n emojivoto"))
            await tapped("tap deploy -n emojivoto", EMOJIVOTO_LINES)
            await tapped("-n mantle tap deploy", CONTROL_LINES)
            wanted = {
                "SRC DST CLIENT SERVER MSG",
                "mantle-viz mantle-destination mantle-viz.mantle mantle-destination.mantle -",
                "probe mantle-identity - - not_provided_by_remote",
            }

            async def missing() -> str:
                rows = (await mantle("-n mantle edges deployment")).splitlines()
                return "\n".join(sorted(wanted - {" ".join(row.split()) for row in rows}))

            await until("", missing)

            async def unlike() -> str:
                """The table, if it is not as it should be."""
                stat = (await mantle("stat authority -n emojivoto")).splitlines()
                alike = len(stat) == len(STAT) and all(map(re.fullmatch, STAT, stat))
                return "" if alike else "\n".join(stat)

            await until("", unlike)

    host.play(scene, seconds=400, prepare=lambda: os.environ.update(MANTLE_PROXY_PATH=str(mantle_proxy)))


def test_what_else_is_seen(root_host: Any, mantle_proxy: Path) -> None:
    async def scene() -> None:
        async with emojivoto():
            await until(EDGES, lambda: mantle("edges deploy -n emojivoto"))
            only_emoji = r"(req|rsp|end) id=\S+ proxy=out src=\S+ dst=[\d.]+:8080 tls=true .*dst_service=emoji-svc.*"
            await tapped("tap svc/web-svc -n emojivoto --to svc/emoji-svc -o wide", [only_emoji])
            silent = await start("tap", "deploy", "-n", "emojivoto", "--path", "/no-such-path")
            await until("mantle_viz_open_taps 1.0", open_taps)
            silent.send_signal(signal.SIGINT)
            assert await silent.communicate() == (b"", WHICH)
            await until("mantle_viz_open_taps 0.0", open_taps)

            record = json.loads(await mantle("check -o json"))
            found = {c["description"]: c for category in record["categories"] for c in category["checks"]}
            assert {c["result"] for c in found.values()} == {"success", "warning"}, record
            assert found["every workload is in the mesh"]["error"] == "default/curl"
            assert "curl → web" in found["no traffic leaves or enters the mesh in plaintext"]["error"]

            identity = json.loads(await mantle("identity deploy/web -n emojivoto -o json"))
            assert identity[0]["dns_names"] == ["web.emojivoto.serviceaccount.identity.mantle.cluster.local"]
            assert identity[0]["spiffe_id"] == "spiffe://cluster.local/ns/emojivoto/sa/web"
            await mantle("identity curl", code=1)

            said = await mantle("diagnostics controller-metrics")
            for component, family in (("identity", "mantle_identity_certify_total"), ("viz", "mantle_viz_open_taps")):
                head = rf"#\n# POD mantle-{component}-\S+ \(\d of 3\)\n# CONTAINER {component}\n#\n(?s:.*)\n{family}"
                assert re.search(head, said), said[:500]

            rows = {row["name"]: row for row in json.loads(await mantle("stat deploy -n emojivoto -o json"))}
            assert rows["emoji"]["tls"] == 1.0 and 0 < rows["web"]["tls"] < 1 and rows["web"]["meshed"] == "1/1"

    root_host.play(scene, seconds=400, prepare=lambda: os.environ.update(MANTLE_PROXY_PATH=str(mantle_proxy)))
