"""Keys and certificates of the custom metrics API: an authority of its own, and the one certificate that it signs.

Both are renewed when two thirds of their time are over. A new authority is first only announced: it signs once the API
server has been told to trust it, and the old one stays trusted until every replica shows the new certificate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_LASTS: Final = timedelta(days=730)
SERVING_LASTS: Final = timedelta(days=90)
BACKDATED: Final = timedelta(minutes=10)
"""Certificates are valid from before they are made: clocks differ a little."""
ANNOUNCED: Final = timedelta(minutes=5)
"""Between an authority's announcement and its first signature: API servers take a moment to hear of it."""
RETIRED: Final = timedelta(days=1)
"""An authority that has been replaced stays trusted for so long: far longer than a replica takes to reload."""

Certificate = x509.Certificate
PrivateKey = ec.EllipticCurvePrivateKey


class BrokenCertificates(Exception):
    """What was kept can't be used; the message names the part."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its private key; equal where the certificates are, which name their keys."""

    certificate: Certificate
    key: PrivateKey = field(compare=False)

    def key_pem(self) -> bytes:
        """The key, not encrypted."""
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificates:
    """All that is kept; ``coming`` is announced and signs nothing yet, ``retired`` have signed before."""

    authority: Pair
    serving: Pair
    coming: Pair | None = None
    retired: tuple[Certificate, ...] = ()

    @property
    def trusted(self) -> tuple[Certificate, ...]:
        """The authorities that the API server should trust, the signing one first."""
        coming = () if self.coming is None else (self.coming.certificate,)
        return (self.authority.certificate, *coming, *self.retired)

    def data(self) -> dict[str, bytes]:
        """As a Secret keeps them: every row, empty ones, too, so that none of somebody else's is left among them."""
        return {
            "ca.crt": to_pem([self.authority.certificate]),
            "ca.key": self.authority.key_pem(),
            "tls.crt": to_pem([self.serving.certificate]),
            "tls.key": self.serving.key_pem(),
            "coming-ca.crt": b"" if self.coming is None else to_pem([self.coming.certificate]),
            "coming-ca.key": b"" if self.coming is None else self.coming.key_pem(),
            "retired-ca.crt": to_pem(self.retired),
        }


def read_certificates(data: dict[str, bytes]) -> Certificates:
    """What a Secret keeps; raises BrokenCertificates."""
    return Certificates(
        authority=_read_pair(data, "ca"),
        serving=_read_pair(data, "tls"),
        coming=_read_pair(data, "coming-ca") if data.get("coming-ca.crt") else None,
        retired=read_pem(data.get("retired-ca.crt", b"")),
    )


def renewed(
    held: Certificates | None, *, names: Sequence[str], published: Sequence[Certificate], now: datetime
) -> Certificates:
    """What should be kept from now on: ``held`` itself where nothing is due.

    ``names`` are the DNS names to serve, ``published`` the authorities that the API server trusts by now.
    """
    if held is None or not _is_valid(held.authority.certificate, now):
        # Replicas still show what an earlier authority has signed.
        return _new(names, retired=[old for old in published if _is_valid(old, now)], now=now)
    kept = _with_current_authority(held, published, now)
    if not _can_serve(kept, names, now):
        kept = replace(kept, serving=_serving(kept.authority, names, now))
    retired = tuple(old for old in kept.retired if _is_valid(old, now) and not _is_over(kept.serving, now))
    return kept if retired == kept.retired else replace(kept, retired=retired)


def to_pem(certificates: Iterable[Certificate]) -> bytes:
    """One after another."""
    return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in certificates)


def read_pem(text: bytes) -> tuple[Certificate, ...]:
    """Those in the text, none where it is empty; raises BrokenCertificates."""
    if not text.strip():
        return ()
    try:
        return tuple(x509.load_pem_x509_certificates(text))
    except ValueError as error:
        raise BrokenCertificates(f"no certificate can be read: {error}") from error


def _read_pair(data: dict[str, bytes], name: str) -> Pair:
    certificates = read_pem(data.get(f"{name}.crt", b""))
    if len(certificates) != 1:
        raise BrokenCertificates(f"{name}.crt holds {len(certificates)} certificates, not one")
    try:
        key = serialization.load_pem_private_key(data.get(f"{name}.key", b""), password=None)
    except (TypeError, ValueError) as error:
        raise BrokenCertificates(f"{name}.key can't be read: {error}") from error
    if not isinstance(key, PrivateKey) or key.public_key() != certificates[0].public_key():
        raise BrokenCertificates(f"{name}.key isn't the key of {name}.crt")
    return Pair(certificates[0], key)


def _with_current_authority(held: Certificates, published: Sequence[Certificate], now: datetime) -> Certificates:
    coming = held.coming
    if coming is None or not _is_valid(coming.certificate, now):
        held = replace(held, coming=None) if coming is not None else held
        return replace(held, coming=_authority(now)) if _is_ageing(held.authority.certificate, now) else held
    announced_at = coming.certificate.not_valid_before_utc + BACKDATED
    if coming.certificate not in published or now < announced_at + ANNOUNCED:
        return held
    retired = (held.authority.certificate, *held.retired)
    return replace(held, authority=coming, coming=None, retired=retired)


def _can_serve(kept: Certificates, names: Sequence[str], now: datetime) -> bool:
    certificate = kept.serving.certificate
    if not _is_valid(certificate, now) or _is_ageing(certificate, now) or _names_of(certificate) != set(names):
        return False
    try:
        certificate.verify_directly_issued_by(kept.authority.certificate)
    except (InvalidSignature, TypeError, ValueError):
        return False
    return True


def _names_of(certificate: Certificate) -> set[str]:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return set()
    return set(found.value.get_values_for_type(x509.DNSName))


def _is_valid(certificate: Certificate, now: datetime) -> bool:
    return certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc


def _is_ageing(certificate: Certificate, now: datetime) -> bool:
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return now > begin + (end - begin) * 2 / 3


def _is_over(serving: Pair, now: datetime) -> bool:
    """Whether every replica has shown this certificate for long."""
    return now > serving.certificate.not_valid_before_utc + BACKDATED + RETIRED


def _new(names: Sequence[str], *, retired: Sequence[Certificate], now: datetime) -> Certificates:
    authority = _authority(now)
    return Certificates(authority=authority, serving=_serving(authority, names, now), retired=tuple(retired))


def _authority(now: datetime) -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    # A name of its own: two authorities of one name would be taken for each other.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"pagedserve-metrics-api-ca-{now:%Y%m%d%H%M%S}")])
    builder = _builder(name, name, key, now, AUTHORITY_LASTS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    return Pair(builder.sign(key, hashes.SHA256()), key)


def _serving(authority: Pair, names: Sequence[str], now: datetime) -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = authority.certificate.subject
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pagedserve-metrics-api")])
    of_authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    builder = _builder(subject, issuer, key, now, SERVING_LASTS)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
    builder = builder.add_extension(of_authority, critical=False)
    return Pair(builder.sign(authority.key, hashes.SHA256()), key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: PrivateKey, now: datetime, lasts: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + lasts)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
