"""emojivoto as its users meet it: real processes on loopback, plain HTTP and gRPC in front of them."""

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from free_ports import free_port
from mantle_emojivoto.emojis import DOUGHNUT, EMOJIS, vote_method
from mantle_emojivoto.votebot import choose
from ruamel.yaml import YAML

APP = Path(__file__).parents[2] / "apps" / "emojivoto"


class Program:
    """One container of emojivoto. `line()` waits for the next line it prints."""

    def __init__(self, name: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mantle_emojivoto", name],
            env={"PYTHONPATH": str(APP), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().rstrip()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=60)
        assert self.process.stdout
        self.process.stdout.close()
        return code


class Urls(NamedTuple):
    web: str
    voting_metrics: str


@pytest.fixture(scope="module")
def urls() -> Iterator[Urls]:
    grpc1, prom1, grpc2, prom2, http = (free_port() for _ in range(5))
    programs = [
        Program("emoji", GRPC_PORT=str(grpc1), PROM_PORT=str(prom1)),
        Program("voting", GRPC_PORT=str(grpc2), PROM_PORT=str(prom2)),
        Program(
            "web",
            WEB_PORT=str(http),
            EMOJISVC_HOST=f"127.0.0.1:{grpc1}",
            VOTINGSVC_HOST=f"127.0.0.1:{grpc2}",
            MESSAGE_OF_THE_DAY="<b>hi</b>",
        ),
    ]
    assert [p.line() for p in programs] == [
        f"emojivoto.v1.EmojiService: gRPC on {grpc1}, metrics on {prom1}",
        f"emojivoto.v1.VotingService: gRPC on {grpc2}, metrics on {prom2}",
        f"web: HTTP on {http}",
    ]
    yield Urls(f"http://127.0.0.1:{http}", f"http://127.0.0.1:{prom2}/metrics")
    assert [p.stop() for p in programs] == [0, 0, 0]


def get(url: str) -> tuple[int, str, str]:
    """(status, content type, body)"""
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return response.status, response.headers.get_content_type(), response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers.get_content_type(), error.read().decode()


def test_a_vote_counts_and_shows_on_the_leaderboard_and_in_the_metrics(urls: Urls):
    status, _, body = get(f"{urls.web}/api/list")
    assert status == 200 and json.loads(body)[0] == {"shortcode": ":poop:", "unicode": "💩"}
    assert len(json.loads(body)) == 100
    assert get(f"{urls.web}/api/vote?choice=:tada:")[0] == 200
    assert json.loads(get(f"{urls.web}/api/leaderboard")[2]) == [{"shortcode": ":tada:", "unicode": "🎉", "votes": "1"}]
    metrics = get(urls.voting_metrics)[2]
    assert 'emojivoto_votes_total{emoji=":tada:"} 1.0' in metrics
    assert 'grpc_method="VoteTada",grpc_service="emojivoto.v1.VotingService"} 1.0' in metrics


def test_the_doughnut_always_fails(urls: Urls):
    status, kind, body = get(f"{urls.web}/api/vote?choice={DOUGHNUT}")
    assert (status, kind) == (500, "application/json")
    assert json.loads(body) == {"error": "rpc error: code = Unknown desc = ERROR"}


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", "Emoji choice [] is mandatory"),
        ("?choice=:nonsense:", "Choosen emoji shortcode [:nonsense:] doesnt exist"),
    ],
)
def test_a_wrong_choice_is_the_callers_mistake(urls: Urls, query: str, message: str):
    assert get(f"{urls.web}/api/vote{query}") == (400, "application/json", json.dumps({"error": message}))


def test_the_page_is_self_contained(urls: Urls):
    status, kind, page = get(urls.web)
    assert (status, kind) == (200, "text/html")
    assert "&lt;b&gt;hi&lt;/b&gt;" in page, "the message is text, not markup"
    for link in re.findall(r'(?:src|href)="([^"]+)"', page):
        assert link.startswith("/"), link
        assert get(urls.web + link)[0] == 200, link


def test_the_bot_says_host_and_port_keeps_its_connection_and_says_what_it_votes_for():
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        port = server.getsockname()[1]
        bot = Program("vote-bot", WEB_HOST=f"127.0.0.1:{port}", HOST_OVERRIDE="web-svc.emojivoto:80", REQUEST_RATE="50")
        connection, _ = server.accept()
        with connection:
            connection.settimeout(60)
            for body in (b'[{"shortcode": ":doughnut:"}]', b"", b'[{"shortcode": ":doughnut:"}]'):
                request = b""
                while not request.endswith(b"\r\n\r\n"):
                    request += connection.recv(4096)
                heard.append(request)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        assert bot.line() == "✔ Voting for :doughnut:"
        assert bot.stop() == 0
    assert [request.split(b" HTTP")[0] for request in heard] == [
        b"GET /api/list",
        b"GET /api/vote?choice=:doughnut:",
        b"GET /api/list",
    ]
    assert all(b"\r\nHost: web-svc.emojivoto:80\r\n" in request for request in heard)


def test_the_bot_prefers_the_doughnut():
    assert choose([":tada:"], 0.149, lambda items: items[0]) == DOUGHNUT
    assert choose([":tada:"], 0.15, lambda items: items[0]) == ":tada:"


def test_the_table_and_the_rpcs_are_the_same_hundred():
    rpcs = re.findall(r"rpc (Vote\w+)\(", (APP / "proto/emojivoto/v1/voting.proto").read_text())
    assert rpcs == [vote_method(code) for code in EMOJIS]
    assert len(set(EMOJIS.values())) == 100


def test_the_manifest_names_only_what_the_image_map_has():
    objects = list(YAML(typ="safe").load_all(APP / "emojivoto.yml"))
    images = YAML(typ="safe").load(APP / "mantle.images.yml")["images"]
    deployments = [o for o in objects if o["kind"] == "Deployment"]
    assert [o["metadata"]["name"] for o in deployments] == ["emoji", "voting", "web", "vote-bot"]
    for deployment in deployments:
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        assert container["image"].split(":")[0] in images
        assert deployment["spec"]["selector"]["matchLabels"] == deployment["spec"]["template"]["metadata"]["labels"]


def test_usage_and_missing_environment_are_said():
    wrong = subprocess.run([sys.executable, "-m", "mantle_emojivoto"], capture_output=True, text=True, cwd=APP)
    assert (wrong.returncode, wrong.stderr) == (2, "usage: mantle-emojivoto web|emoji|voting|vote-bot\n")
    bare = subprocess.run(
        [sys.executable, "-m", "mantle_emojivoto", "web"], capture_output=True, text=True, cwd=APP, env={}
    )
    assert (bare.returncode, bare.stderr) == (2, "mantle-emojivoto: the environment variable WEB_PORT is not set\n")
