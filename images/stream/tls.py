"""The certificates of one session: an authority that signs one server and one client and then is forgotten.

Each side trusts this authority and nobody else, so both are pinned, and a new session has nothing in common with an old
one. They are valid from long ago until long after: the clock of a machine that boots may be wrong by years, and what
ends a session is its server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

__all__ = ["Certificates", "make_certificates"]

_FROM, _UNTIL = datetime(1990, 1, 1), datetime(2049, 12, 31)


@dataclass(frozen=True, slots=True)
class Certificates:
    """Files by name, in PEM: `server` as QEMU wants them, `client` as the initrd does. Both have a secret key."""

    server: Mapping[str, bytes]
    client: Mapping[str, bytes]


def make_certificates(session: str) -> Certificates:
    """New ones for a server that is called `session`, which has to be a valid host name."""
    key = ec.generate_private_key(ec.SECP256R1())
    authority = _sign(_builder(f"{session} authority", key.public_key()), f"{session} authority", key, True)
    server_key, server = _leaf(session, f"{session} authority", key, ExtendedKeyUsageOID.SERVER_AUTH)
    client_key, client = _leaf(f"{session}-client", f"{session} authority", key, ExtendedKeyUsageOID.CLIENT_AUTH)
    return Certificates(
        {"ca-cert.pem": _pem(authority), "server-cert.pem": _pem(server), "server-key.pem": _secret(server_key)},
        {"ca.pem": _pem(authority), "client.pem": _pem(client), "client.key": _secret(client_key)},
    )


def _leaf(
    name: str, issuer: str, key: ec.EllipticCurvePrivateKey, usage: x509.ObjectIdentifier
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    own = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(name, own.public_key())
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    return own, _sign(builder, issuer, key, False)


def _builder(name: str, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_FROM)
        .not_valid_after(_UNTIL)
    )


def _sign(
    builder: x509.CertificateBuilder, issuer: str, key: ec.EllipticCurvePrivateKey, authority: bool
) -> x509.Certificate:
    usage = x509.KeyUsage(
        digital_signature=not authority, key_cert_sign=authority, crl_sign=False, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    return (
        builder.issuer_name(_name(issuer))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _secret(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
