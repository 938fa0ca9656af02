"""The webhook's certificate over years, on a clock that is turned by hand."""

from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import DNSName
from cryptography.x509.verification import PolicyBuilder, Store

from mantle.core.serving_cert import Material, Plan, Unusable, dump, load, renewed

START = datetime(2026, 1, 1, tzinfo=UTC)
PLAN = Plan("mantle-injector.mantle.svc", ("mantle-injector.mantle.svc",))
NOTHING = Unusable("there is no such Secret")


def accepted(material: Material, bundle: Material, at: datetime) -> None:
    """As the API server checks it, with the bundle it has."""
    store = Store([a.certificate for a in bundle.authorities])
    verifier = PolicyBuilder().store(store).time(at).build_server_verifier(DNSName("mantle-injector.mantle.svc"))
    verifier.verify(material.certificate, [])


def test_from_nothing_both_are_made_and_nothing_is_left_to_do():
    made = renewed(NOTHING, PLAN, START)
    accepted(made, made, START)
    assert renewed(made, PLAN, START) is None
    assert renewed(made, PLAN, START + timedelta(days=20)) is None


def test_it_survives_the_secret():
    made = renewed(NOTHING, PLAN, START)
    again = load(dump(made))
    assert isinstance(again, Material)
    assert dump(again) == dump(made)
    assert renewed(again, PLAN, START) is None


def test_five_years_with_two_looks_a_day_and_readers_that_are_a_minute_behind():
    """At every look the certificate in use is trusted by a reader whose bundle is a minute old."""
    material = renewed(NOTHING, PLAN, START)
    behind, since = material, START
    certificates, bundles, now = {material.certificate}, {material.bundle}, START
    while now < START + timedelta(days=5 * 365):
        now += timedelta(hours=12)
        made = renewed(material, PLAN, now)
        if made is not None:
            accepted(made, behind, now)  # served before the readers learn of a new authority
            material, since = made, now
            certificates.add(made.certificate)
            bundles.add(made.bundle)
        if now - since >= timedelta(minutes=1):
            behind = material
        accepted(material, behind, now)
        assert len(material.authorities) <= 2
    assert len(certificates) in range(85, 100)  # every 21 days
    assert len(bundles) >= 14  # every 252 days one joins, later one leaves


def test_a_new_authority_joins_first_and_signs_later():
    first = renewed(NOTHING, PLAN, START)
    due = START + timedelta(days=253)
    joined = renewed(first, PLAN, due)
    assert len(joined.authorities) == 2
    soon = renewed(joined, PLAN, due + timedelta(seconds=30))
    assert soon is None or soon.certificate.issuer == first.authorities[0].certificate.subject
    later = renewed(joined, PLAN, due + timedelta(days=31))
    later.certificate.verify_directly_issued_by(joined.authorities[1].certificate)


def test_after_an_outage_longer_than_everything_it_starts_anew():
    first = renewed(NOTHING, PLAN, START)
    later = START + timedelta(days=1000)
    made = renewed(first, PLAN, later)
    accepted(made, made, later)
    assert len(made.authorities) == 1


def test_another_service_name_makes_another_certificate_of_the_same_authority():
    first = renewed(NOTHING, PLAN, START)
    other = Plan("mantle-injector.mesh.svc", ("mantle-injector.mesh.svc", "localhost"))
    made = renewed(first, other, START)
    assert made.authorities == first.authorities and made.certificate != first.certificate
    assert renewed(made, other, START) is None


def test_a_reader_whose_clock_is_five_minutes_behind_accepts_it():
    made = renewed(NOTHING, PLAN, START)
    accepted(made, made, START - timedelta(minutes=5))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"tls.key": b""}, "there is no tls.key"),
        ({"ca.crt": b"garbage"}, "not PEM"),
        ({"tls.key": None}, "its keys are not those of its certificates"),
        ({"ca.crt": None, "ca.key": None}, "none of its authorities signed its certificate"),
    ],
)
def test_a_secret_that_somebody_damaged_is_made_anew(damage, says):
    data, other = dump(renewed(NOTHING, PLAN, START)), dump(renewed(NOTHING, PLAN, START))
    data |= {key: other[key] if value is None else value for key, value in damage.items()}
    found = load(data)
    assert isinstance(found, Unusable) and says in str(found)
    made = renewed(found, PLAN, START)
    accepted(made, made, START)
    assert isinstance(made.key.curve, ec.SECP256R1)
