"""Keys, certificates and credentials for the local push providers: made here, valid nowhere else.

The servers write what their clients need into their own folder; `write_demo_credentials` turns the ready
lines of both servers into settings.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from carillon.clock import Clock, SystemClock

DEMO_PROJECT: Final = "carillon-demo"
DEMO_KEY_ID: Final = "CARILLON01"
DEMO_TEAM_ID: Final = "CARILLON00"
DEMO_TOPIC: Final = "dev.carillon.demo"


def write_private(path: Path, data: bytes) -> Path:
    """Write a file that only its owner can read, in one step (a reader never sees half of it)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    with contextlib.suppress(FileNotFoundError):
        partial.unlink()
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    partial.replace(path)
    return path


def _pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def server_tls(folder: Path, clock: Clock | None = None) -> tuple[ssl.SSLContext, Path]:
    """The server's TLS context and the CA file that its clients trust.

    A CA and a leaf for 127.0.0.1, ::1 and localhost are made in `folder` at the first start and kept, so that
    a restarted server is still trusted by clients that have read the CA.
    """
    ca_file, leaf_file = folder / "ca.pem", folder / "server.pem"
    if not (ca_file.exists() and leaf_file.exists()):
        now = datetime.datetime.fromtimestamp((clock or SystemClock()).now_ms() / 1000, datetime.UTC)
        _make_chain(ca_file, leaf_file, now)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(leaf_file)
    return context, ca_file


def _make_chain(ca_file: Path, leaf_file: Path, now: datetime.datetime) -> None:
    ca_key, leaf_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Carillon local provider CA")])
    begin, end = now - datetime.timedelta(days=1), now + datetime.timedelta(days=3650)
    ca = (
        x509.CertificateBuilder()
        .subject_name(ca_name)
        .issuer_name(ca_name)
        .public_key(ca_key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=False,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=True,
                crl_sign=True,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    leaf = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")]))
        .issuer_name(ca_name)
        .public_key(leaf_key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName(
                [
                    x509.DNSName("localhost"),
                    x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
                    x509.IPAddress(ipaddress.ip_address("::1")),
                ]
            ),
            critical=False,
        )
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
        .sign(ca_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    write_private(leaf_file, _pem(leaf_key) + leaf.public_bytes(pem) + ca.public_bytes(pem))
    write_private(ca_file, ca.public_bytes(pem))


def write_service_account(path: Path, token_uri: str, project: str = DEMO_PROJECT) -> rsa.RSAPublicKey:
    """Write a service account file for the local FCM and return its public key.

    A key already there is kept: a server that restarts on another port still knows its clients.
    """
    key: rsa.RSAPrivateKey | None = None
    if path.exists():
        kept = serialization.load_pem_private_key(json.loads(path.read_text())["private_key"].encode(), None)
        key = kept if isinstance(kept, rsa.RSAPrivateKey) else None
    if key is None:
        key = rsa.generate_private_key(65537, 2048)
    account = {
        "type": "service_account",
        "project_id": project,
        "private_key_id": "carillon-local",
        "private_key": _pem(key).decode(),
        "client_email": f"push@{project}.iam.gserviceaccount.com",
        "client_id": "0",
        "token_uri": token_uri,
    }
    write_private(path, json.dumps(account, indent=1).encode())
    return key.public_key()


def write_apns_key(path: Path) -> ec.EllipticCurvePublicKey:
    """Write a .p8 signing key for the local APNs (keeping one already there) and return its public key."""
    key: ec.EllipticCurvePrivateKey | None = None
    if path.exists():
        kept = serialization.load_pem_private_key(path.read_bytes(), None)
        key = kept if isinstance(kept, ec.EllipticCurvePrivateKey) else None
    if key is None:
        key = ec.generate_private_key(ec.SECP256R1())
        write_private(path, _pem(key))
    return key.public_key()


def write_demo_credentials(
    folder: str | Path, fcm: Mapping[str, Any] | None, apns: Mapping[str, Any] | None
) -> dict[str, str]:
    """Copy the credentials of running local providers into `folder` and name the settings that use them.

    Args:
        folder: where the files go, readable by their owner only.
        fcm: ready line of `carillon.testing.fcm_server`, or None to leave FCM out.
        apns: ready line of `carillon.testing.apns_server`, or None likewise.

    Returns:
        Values of `settings.push`, e.g. for `Settings.with_values(push=...)`.
    """
    folder = Path(folder).absolute()
    values: dict[str, str] = {}
    if fcm is not None:
        account = Path(fcm["credentialsFile"])
        ca_file = Path(fcm["caFile"])
        values |= {
            "fcm_url": fcm["url"],
            "fcm_credentials": str(write_private(folder / "fcm-service-account.json", account.read_bytes())),
            "fcm_ca_file": str(write_private(folder / "fcm-ca.pem", ca_file.read_bytes())),
            "fcm_project": fcm["project"],
        }
    if apns is not None:
        key, ca_file = Path(apns["keyFile"]), Path(apns["caFile"])
        values |= {
            "apns_url": apns["url"],
            "apns_key_file": str(write_private(folder / "apns-key.p8", key.read_bytes())),
            "apns_key_id": apns["keyId"],
            "apns_team_id": apns["teamId"],
            "apns_topic": apns["topic"],
            "apns_ca_file": str(write_private(folder / "apns-ca.pem", ca_file.read_bytes())),
        }
    return values
