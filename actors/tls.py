"""TLS for listeners: one certificate and key from files, TLS 1.2 or later."""

from __future__ import annotations

import ssl

from carillon.errors import ClusterError


def server_context(cert_file: str, key_file: str, section: str) -> ssl.SSLContext | None:
    """The context of a listener; None if no certificate is set: the listener speaks plainly.

    Args:
        cert_file: PEM, the certificate and its chain. key_file: PEM, its key.
        section: of the settings, named in errors.

    Raises:
        ClusterError: the files cannot be used.
    """
    if not cert_file:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert_file, key_file)
    except (OSError, ssl.SSLError) as exc:
        raise ClusterError(
            f"{section}.tls_cert_file {cert_file} and {section}.tls_key_file {key_file} cannot be used: {exc}"
        ) from exc
    return context
