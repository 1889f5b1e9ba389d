"""Limits and places of one server."""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slm.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingSettings:
    """How one server is run; every limit has a default that suits a laptop."""

    host: str = "127.0.0.1"
    """Address to listen on; any other than the machine's own needs a keys file."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    keys_file: Path | None = None
    """Hashed bearer keys (``slm key``); None leaves asking open, to this machine alone."""
    is_teaching: bool = False
    """Whether tasks may be taught and forgotten over HTTP."""
    adapters_folder: Path | None = None
    """Where adapters loaded by ``/v1/load_lora_adapter`` must lie; None refuses to load any."""
    origins: tuple[str, ...] = ()
    """Web origins that browsers may call from (CORS); none by default."""
    max_rows: int = 64
    """Rows that are written at the same time."""
    max_queue: int = 256
    """Requests that may wait; one more is told to come back (429)."""
    prefill_tokens: int = 512
    """Prompt tokens read between two steps of the rows that are being written."""
    max_tokens: int = 1024
    """Longest answer that may be asked for, in tokens."""
    default_tokens: int = 128
    """Longest answer where a request does not say."""
    max_inputs: int = 256
    """Texts in one request."""
    max_body_bytes: int = 1 << 20
    """Longest body of a request."""
    max_upload_bytes: int = 64 << 20
    """Longest upload of a data file or an adapter."""
    deadline_s: float = 120.0
    """Longest time from a request to the end of its answer."""
    header_timeout_s: float = 10.0
    """Longest time a client may take to send its headers."""
    body_timeout_s: float = 30.0
    """Longest time a client may take to send its body."""
    poll_s: float = 0.5
    """Time between two looks at the store's version."""
    grace_s: float = 30.0
    """Longest time that running requests get to finish when the server stops."""
    max_jobs: int = 16
    """Teaching jobs that may wait."""
    is_logging_prompts: bool = False
    """Whether prompts are written to the log."""
    certificate: Path | None = None
    """TLS certificate (PEM), with its key in ``certificate_key``."""
    certificate_key: Path | None = None
    """Private key of the certificate (PEM)."""
    upstream: str | None = None
    """URL of a vLLM, SGLang or slm server that answers in place of the own engine."""
    mixtures: tuple[Mapping[str, float], ...] = ()
    """Mixtures of tasks that an upstream may be given as one adapter, where exactly they are retrieved."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run, or not safely; origins are kept as browsers send them.

        Raises:
            ConfigError: a limit is out of range, the server would be open to the network without keys, or
                every web page could call it.
        """
        for name in ("max_rows", "max_queue", "prefill_tokens", "max_tokens", "default_tokens", "max_inputs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}: raise it")
        for name in ("deadline_s", "header_timeout_s", "body_timeout_s", "poll_s", "grace_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}: raise it")
        if self.keys_file is None and not is_loopback(self.host):
            raise ConfigError(
                f"host {self.host} can be reached from other machines and no keys file is given: "
                "make one with slm key and give it with --keys, or listen on 127.0.0.1"
            )
        if any("*" in origin for origin in self.origins):
            raise ConfigError(
                "an origin cannot be '*' or hold one: name each web page's, https://app.example say"
            )
        origins = tuple(origin.rstrip("/").lower() for origin in self.origins)
        object.__setattr__(self, "origins", origins)
        if self.upstream is not None and self.adapters_folder is None:
            raise ConfigError(
                "an upstream server gets adapters through a folder it shares with this one: give --adapters"
            )
        if (self.certificate is None) != (self.certificate_key is None):
            raise ConfigError("a certificate and its key go together: give both or none")
        if self.certificate is not None and self.certificate_key is not None:
            _check_certificate(self.certificate, self.certificate_key)


def _check_certificate(certificate: Path, key: Path) -> None:
    missing = [file for file in (certificate, key) if not file.is_file()]
    if missing:
        raise ConfigError(f"{missing[0]} does not exist: name the PEM file of the certificate or of its key")
    try:
        # Without a password, so that an encrypted key is refused here and nobody is asked for one later.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except OSError as error:
        raise ConfigError(
            f"{certificate} and {key} are no certificate and its key ({error}): give PEM files that belong "
            "together, the key not encrypted"
        ) from None


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
