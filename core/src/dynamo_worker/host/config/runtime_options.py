"""Flags that set a variable of the Dynamo runtime, which the worker itself does not read.

They have the names that they have with Dynamo's own workers. Standard library only, as
:mod:`dynamo_worker.host.config.options`.
"""

from __future__ import annotations

from typing import Final

from dynamo_worker.host.config.option_types import RUNTIME, Number, Option


def _variable(name: str, text: str, env: str = "", **more: object) -> Option:
    usual = {} if {"kind", "choices", "number"} & more.keys() else {"metavar": "FILE"}
    return Option(name, RUNTIME, text, env or f"DYN_{name.upper()}", default_text="the runtime's", **{**usual, **more})  # type: ignore[arg-type]


_POSITIVE: Final = Number(1, 2**31 - 1)

#: All of them. They are no settings: a configuration file does not have them.
RUNTIME_OPTIONS: Final = (
    _variable("response_plane", "Transport for responses; frontends must use the same.", choices=("tcp", "quic")),
    _variable(
        "engine_request_limit",
        "Refuse requests beyond this many at a time, so that they migrate.",
        number=_POSITIVE,
        metavar="N",
    ),
    _variable("tcp_tls_cert_path", "Certificate of the TCP request plane (PEM)."),
    _variable("tcp_tls_key_path", "Private key for this certificate (PEM)."),
    _variable("tcp_tls_ca_cert_path", "Certificate of the authority that signs those of peers (PEM)."),
    _variable("tcp_tls_insecure", "Accept any certificate of a peer (for development).", kind="switch"),
    _variable("tcp_tls_server_name", "Name to expect in the certificates of peers.", metavar="NAME"),
    _variable(
        "tcp_tls_handshake_timeout",
        "Time limit for a TLS handshake, in seconds.",
        "DYN_TCP_TLS_HANDSHAKE_TIMEOUT_SECS",
        number=_POSITIVE,
        metavar="SECONDS",
    ),
    _variable("tcp_tls_client_cert_path", "Certificate to present to peers (PEM)."),
    _variable("tcp_tls_client_key_path", "Private key for this certificate (PEM)."),
    _variable("tcp_tls_client_ca_cert_path", "Certificate of the authority that signs those of clients (PEM)."),
    _variable(
        "nats_tls_ca_cert_path",
        "Certificate of the authority that signs the NATS server's (PEM).",
        "NATS_TLS_CA_CERT_PATH",
    ),
    _variable(
        "nats_tls_insecure",
        "Accept any certificate of the NATS server (for development).",
        "NATS_TLS_INSECURE",
        kind="switch",
    ),
    _variable(
        "nats_tls_client_cert_path", "Certificate to present to the NATS server (PEM).", "NATS_TLS_CLIENT_CERT_PATH"
    ),
    _variable("nats_tls_client_key_path", "Private key for this certificate (PEM).", "NATS_TLS_CLIENT_KEY_PATH"),
)
