"""The wire itself, as the debug sidecar sees it: TLS between pods, with the command that the documentation gives."""

from __future__ import annotations

import re

import pytest
from e2e.stage import EMOJIVOTO, Cluster, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
PACKET = re.compile(r"\s*\d+ [\d.]+\s+(\S+) → (\S+)\s+(\S+) \d+ (.*)")


def captured(cluster: Cluster, pod: str, decode: str, seconds: int = 10) -> list[re.Match[str]]:
    """Packets of some seconds between pods, by the seed's own line; loopback is left out, as there."""
    line = f"timeout {seconds} tshark -i any -d {decode} 2>/dev/null | grep -v 127.0.0.1"
    said = cluster.kubectl("exec", "-n", "emojivoto", pod, "-c", "mantle-debug", "--", "bash", "-c", line, code=None)
    return [match for text in said.splitlines() if (match := PACKET.fullmatch(text))]


def debugged(cluster: Cluster) -> str:
    """The name of voting's pod, which has the debug sidecar."""
    pods = [p["metadata"]["name"] for p in cluster.pods("emojivoto", "voting-") if len(p["spec"]["containers"]) > 1]
    assert pods, "no pod of voting has the debug sidecar"
    return str(pods[0])


def test_the_debug_sidecar_sees_tls_and_no_request_in_the_clear(emojivoto: Cluster) -> None:
    """Links run on one port, so that is the port to decode."""
    emojivoto.apply(emojivoto.mantle("inject", "--enable-debug-sidecar", "-", given=EMOJIVOTO))
    emojivoto.rolled_out("emojivoto")

    def seen() -> bool:
        packets = captured(emojivoto, debugged(emojivoto), "tcp.port==4143,ssl")
        assert not [p[0] for p in packets if "emojivoto.v1" in p[4]], "a request is readable on the wire"
        return any(p[3].startswith("TLSv1") and "Application Data" in p[4] for p in packets)

    until(seen, "TLS between web and voting")


def test_with_transparent_transport_the_seeds_own_line_shows_tls_on_the_applications_port(emojivoto: Cluster) -> None:
    """`config.mantle.dev/transport-mode: transparent`, onto the running namespace: no pod is restarted."""
    emojivoto.kubectl("annotate", "ns", "emojivoto", "config.mantle.dev/transport-mode=transparent", "--overwrite")
    try:

        def seen() -> bool:
            packets = captured(emojivoto, debugged(emojivoto), "tcp.port==8080,ssl")
            assert not [p[0] for p in packets if "emojivoto.v1" in p[4]], "a request is readable on the wire"
            return any(p[3].startswith("TLSv1") and "Application Data" in p[4] for p in packets)

        until(seen, "TLS on 8080 between web and voting")
    finally:
        emojivoto.kubectl("annotate", "ns", "emojivoto", "config.mantle.dev/transport-mode-")


def test_after_injecting_again_without_it_the_debug_sidecar_is_gone(emojivoto: Cluster) -> None:
    emojivoto.apply(emojivoto.mantle("inject", "apps/emojivoto/emojivoto.yml"))
    emojivoto.rolled_out("emojivoto")

    def gone() -> bool:
        return "mantle-debug" not in {
            c["name"] for pod in emojivoto.pods("emojivoto") for c in pod["spec"]["containers"]
        }

    until(gone, "no pod has the debug sidecar")
