"""The life of the certificates on a clock that the tests turn, judged by a TLS stack that isn't theirs."""

from __future__ import annotations

import ssl
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import count

import pytest

from pagedserve_operator.metrics_api.certificates import (
    ANNOUNCED,
    AUTHORITY_LASTS,
    RETIRED,
    SERVING_LASTS,
    BrokenCertificates,
    Certificate,
    Certificates,
    read_certificates,
    read_pem,
    renewed,
    to_pem,
)

NAMES = ("metrics.ops.svc", "metrics.ops.svc.cluster.local")
NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)


def made(now: datetime = NOW) -> Certificates:
    return renewed(None, names=NAMES, published=(), now=now)


def later(held: Certificates | None, now: datetime, published: Sequence[Certificate] | None = None) -> Certificates:
    trusted = held.trusted if published is None and held is not None else published or ()
    return renewed(held, names=NAMES, published=trusted, now=now)


def is_trusted(serving: Certificates, trusted: Sequence[Certificate], name: str = NAMES[0]) -> bool:
    """Whether a client that trusts these authorities accepts the server: a real handshake, in memory."""
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile() as both:
        both.write(to_pem([serving.serving.certificate]) + serving.serving.key_pem())
        both.flush()
        server_side.load_cert_chain(both.name)
    client_side = ssl.create_default_context(cadata=to_pem(trusted).decode())
    one, other = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_side.wrap_bio(one, other, server_side=True)
    client = client_side.wrap_bio(other, one, server_hostname=name)
    pending = {client, server}
    for _ in range(10):
        for side in list(pending):
            try:
                side.do_handshake()
                pending.discard(side)
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError:
                return False
    return not pending


def test_what_is_new_is_trusted_by_its_authority_and_no_other() -> None:
    one, other = made(), made()
    assert is_trusted(one, one.trusted)
    assert not is_trusted(one, other.trusted)
    assert all(is_trusted(one, one.trusted, name) for name in NAMES)
    assert not is_trusted(one, one.trusted, "elsewhere.ops.svc")


def test_what_is_kept_is_what_was_made() -> None:
    held = replace(made(), coming=made().authority, retired=(made().authority.certificate,))
    again = read_certificates(held.data())
    assert again.data() == held.data()
    assert again == held
    assert read_certificates(made().data()).coming is None


def test_nothing_is_made_while_nothing_is_due() -> None:
    held = made()
    assert all(later(held, NOW + days * DAY) is held for days in (0, 1, 30, 59))


def test_the_serving_certificate_is_renewed_long_before_its_end() -> None:
    held = made()
    after = later(held, NOW + SERVING_LASTS * 0.7)
    assert after.serving.certificate != held.serving.certificate
    assert after.authority == held.authority
    assert accepts(held.trusted, after, NOW + SERVING_LASTS * 0.7), "the API server needs no news"


def test_a_new_authority_is_announced_before_it_signs() -> None:
    held = made()
    then = NOW + AUTHORITY_LASTS * 0.7
    announced = later(held, then)
    assert announced.coming is not None
    assert announced.authority == held.authority
    assert accepts(announced.trusted, announced, then)
    # Not published yet, or a moment ago: nothing is signed by it.
    waiting = later(announced, then + 10 * DAY, published=held.trusted)
    assert waiting.authority == held.authority
    assert later(announced, then + timedelta(minutes=1)).authority == held.authority
    signing = later(announced, then + ANNOUNCED + timedelta(minutes=1))
    assert signing.authority == announced.coming
    assert signing.coming is None
    assert signing.retired == (held.authority.certificate,)
    assert signing.serving.certificate.issuer == announced.coming.certificate.subject


def test_at_no_moment_of_five_years_is_a_replica_refused() -> None:
    """Replicas show what was kept a look ago, and the API server trusts what was published a look ago."""
    held = made()
    shown, trusted = held, held.trusted
    renewals = 0
    for hours in count(0, 12):
        if hours > 5 * 365 * 24:
            break
        now = NOW + timedelta(hours=hours)
        newer = renewed(held, names=NAMES, published=trusted, now=now)
        renewals += newer.serving.certificate != held.serving.certificate
        held = newer
        # Neither has heard of the newest yet; then first the one, then the other.
        assert accepts(trusted, shown, now)
        assert accepts(trusted, held, now), "a replica was quicker than the API server"
        trusted = held.trusted
        assert accepts(trusted, shown, now), "the API server was quicker than a replica"
        shown = held
    assert renewals > 25
    assert len(held.trusted) <= 2


def accepts(trusted: Sequence[Certificate], shown: Certificates, now: datetime) -> bool:
    """As is_trusted, for any time."""
    certificate = shown.serving.certificate
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        return False
    issuers = [authority for authority in trusted if authority.subject == certificate.issuer]
    return any(
        has_signed(authority, certificate) and authority.not_valid_before_utc <= now <= authority.not_valid_after_utc
        for authority in issuers
    )


@cache
def has_signed(authority: Certificate, certificate: Certificate) -> bool:
    certificate.verify_directly_issued_by(authority)
    return True


def test_a_retired_authority_goes_once_everybody_has_moved_on() -> None:
    held = replace(made(), retired=(made().authority.certificate,))
    assert later(held, NOW + RETIRED / 2).retired == held.retired
    assert later(held, NOW + RETIRED * 2).retired == ()


def test_a_lost_secret_is_made_anew_and_replicas_that_show_the_old_one_stay_trusted() -> None:
    old = made()
    new = renewed(None, names=NAMES, published=old.trusted, now=NOW)
    assert is_trusted(old, new.trusted)
    assert is_trusted(new, new.trusted)


@pytest.mark.parametrize(
    "now", [NOW + AUTHORITY_LASTS + DAY, NOW - DAY], ids=["it is over", "it was made by a clock ahead of the server's"]
)
def test_an_authority_that_is_not_valid_is_made_anew(now: datetime) -> None:
    held = made()
    new = later(held, now)
    assert new.authority != held.authority
    assert accepts(new.trusted, new, now)


def test_other_names_are_served_with_another_certificate() -> None:
    held = made()
    moved = renewed(held, names=("metrics.elsewhere.svc",), published=held.trusted, now=NOW)
    assert is_trusted(moved, held.trusted, "metrics.elsewhere.svc")


def test_a_certificate_of_another_authority_is_replaced() -> None:
    held = replace(made(), serving=made().serving)
    assert not is_trusted(held, held.trusted)
    assert is_trusted(later(held, NOW), held.trusted)


@pytest.mark.parametrize(
    ("row", "value", "told"),
    [
        ("ca.crt", b"", "ca.crt holds 0 certificates"),
        ("ca.crt", b"nonsense", "no certificate can be read"),
        ("ca.key", b"", "ca.key can't be read"),
        ("tls.key", b"nonsense", "tls.key can't be read"),
        ("tls.key", made().serving.key_pem(), "tls.key isn't the key of tls.crt"),
        ("tls.crt", to_pem(made().trusted) * 2, "tls.crt holds 2 certificates"),
        ("coming-ca.crt", to_pem(made().trusted), "coming-ca.key can't be read"),
        ("retired-ca.crt", b"nonsense", "no certificate can be read"),
    ],
)
def test_what_is_broken_is_told_by_its_part(row: str, value: bytes, told: str) -> None:
    with pytest.raises(BrokenCertificates, match=told):
        read_certificates({**made().data(), row: value})


def test_an_empty_secret_is_broken() -> None:
    with pytest.raises(BrokenCertificates):
        read_certificates({})


def test_no_certificate_is_none() -> None:
    assert read_pem(b"\n") == ()


def test_keys_and_certificates_are_for_their_purpose_alone() -> None:
    held = made()
    purposes = {str(extension.value) for extension in held.serving.certificate.extensions}
    assert any("ca=False" in purpose for purpose in purposes)
    assert any("ca=True" in str(extension.value) for extension in held.authority.certificate.extensions)
