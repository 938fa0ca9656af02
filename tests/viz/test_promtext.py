"""Our reader of the text format agrees with prometheus-client's parser, and survives what that one refuses."""

from __future__ import annotations

import math

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from mantle.viz.promtext import Reader, Series


def peer_reading(text: str) -> dict[Series, float]:
    return {
        Series(sample.name, tuple(sorted(sample.labels.items()))): float(sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def registry_text() -> str:
    registry = CollectorRegistry()
    odd = Counter("requests", "With\nodd \\ help.", ["path", "tls"], registry=registry)
    for path in ("/", 'quo"te', "back\\slash", "new\nline", "} 5 {", "comma,", "ünï", ""):
        odd.labels(path=path, tls="true").inc(3)
    Gauge("open_connections", "Open.", registry=registry).set(-2.5)
    histogram = Histogram("latency_ms", "Latency.", ["direction"], buckets=(1, 2, 50000), registry=registry)
    histogram.labels(direction="in").observe(1.5)
    return generate_latest(registry).decode()


PROXY_TEXT = """\
# HELP response_total Total responses.
# TYPE response_total counter
response_total{direction="inbound",tls="true",client_id="web.emojivoto",classification="success"} 17
response_total{direction="outbound",tls="no_identity",no_tls_reason="not_provided_by_service_discovery",} 2
tcp_open_connections 4 1700000000000

go_gauge 1e-3
inf_bucket{le="+Inf"} +Inf
"""


@pytest.mark.parametrize("text", [registry_text(), PROXY_TEXT], ids=["prometheus-client", "proxy"])
def test_agrees_with_the_reference_parser(text: str) -> None:
    scrape = Reader().read(text)
    assert scrape.bad_lines == 0
    assert scrape.samples == peer_reading(text)


def test_keeps_only_the_families_asked_for() -> None:
    scrape = Reader(["tcp_open_connections"]).read(PROXY_TEXT)
    assert scrape.samples == {Series("tcp_open_connections", ()): 4.0}


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        'a{b="c" 1',
        'a{b="c"} one',
        'a{b="c",b="d"} 1',
        'a{b="c} 1',
        "a{b=c} 1",
        "a 1_000",
        'a{"} 1',
        "a{b} 1",
    ],
)
def test_a_bad_line_is_counted_and_the_rest_is_read(line: str) -> None:
    scrape = Reader().read(f"before 1\n{line}\nafter 2\n")
    assert scrape.bad_lines == 1
    assert scrape.samples == {Series("before", ()): 1.0, Series("after", ()): 2.0}


def test_not_a_number_is_read_as_one() -> None:
    (value,) = Reader().read("a NaN\n").samples.values()
    assert math.isnan(value)


def test_what_it_remembers_is_bounded() -> None:
    reader = Reader(remember=10)
    for number in range(100):
        reader.read(f'a{{n="{number}"}} 1\n')
    assert len(reader._seen) <= 10
