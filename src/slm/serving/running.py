"""Running the app: sockets, timeouts for slow clients, TLS, logs, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from typing import Any, final

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from slm.errors import ConfigError
from slm.serving.settings import ServingSettings

_MAX_WAITING = 2048
"""Connections that may wait to be taken."""
_TOO_SLOW = (
    b'{"error": {"message": "the headers took too long: send them at once", "type": "timeout_error", '
    b'"param": null, "code": "timeout"}}'
)


def patient_protocol(header_timeout_s: float) -> type[H11Protocol]:
    """HTTP that waits only so long for a client's headers."""

    class Protocol(H11Protocol):
        """uvicorn's, with an alarm for connections on which no request begins."""

        _alarm: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._set_alarm()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self._alarm is not None:
                self._alarm.cancel()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._set_alarm()

        def _is_answering(self) -> bool:
            cycle: Any = self.cycle
            return cycle is not None and not cycle.response_complete

        def _has_answered(self) -> bool:
            cycle: Any = self.cycle
            return cycle is not None

        def _set_alarm(self) -> None:
            if self._alarm is not None:
                self._alarm.cancel()
            self._alarm = self.loop.call_later(header_timeout_s, self._ring)

        def _ring(self) -> None:
            if self.transport.is_closing() or self._is_answering():
                return
            if not self._has_answered():
                head = (
                    b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close\r\n"
                )
                length = f"content-length: {len(_TOO_SLOW)}\r\n\r\n".encode()
                self.transport.write(head + length + _TOO_SLOW)
            self.transport.close()

    return Protocol


@final
class AppServer(uvicorn.Server):
    """uvicorn's, which at its end waits for answers, but not for those who only watch."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let watchers go, finish what is being answered, and stop."""
        app: Any = self.config.app
        app.state.server.teacher.hang_up()
        await super().shutdown(sockets)


def server_of(app: FastAPI, settings: ServingSettings) -> AppServer:
    """The server of an app that :func:`slm.serving.app.create_app` made, ready to run."""
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=patient_protocol(settings.header_timeout_s),
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=int(settings.grace_s) + 1,
        h11_max_incomplete_event_size=1 << 16,
        ssl_certfile=settings.certificate,
        ssl_keyfile=settings.certificate_key,
    )
    return AppServer(config)


def bind(settings: ServingSettings) -> list[socket.socket]:
    """Take the port on every address of the host, so that nobody else can; connections are refused yet.

    Raises:
        ConfigError: the port is in use or not allowed, or the host is no address of this machine.
    """
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
        return [_take(*address) for address in addresses if len(addresses) == 1 or _is_here(*address)]
    except OSError as error:
        raise _cannot_listen(settings, error) from error


def listen(sockets: list[socket.socket], settings: ServingSettings) -> int:
    """Let clients connect, who are answered once the app runs; return the port.

    Raises:
        ConfigError: another process took the port as well and was faster.
    """
    try:
        for taken in sockets:
            taken.listen(_MAX_WAITING)
    except OSError as error:
        raise _cannot_listen(settings, error) from error
    return int(sockets[0].getsockname()[1])


def run_app(app: FastAPI, settings: ServingSettings, sockets: list[socket.socket] | None = None) -> None:
    """Serve until the process is told to stop; running requests are finished first.

    Args:
        app: what answers.
        settings: its limits.
        sockets: of :func:`bind`; None takes the port now.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    server_of(app, settings).run(bind(settings) if sockets is None else sockets)


def _take(family: int, address: Any) -> socket.socket:
    taken = socket.socket(family, socket.SOCK_STREAM)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, os.name != "nt")
        if family == socket.AF_INET6:
            taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, True)
        taken.bind(address)
    except OSError:
        taken.close()
        raise
    return taken


def _is_here(family: int, address: Any) -> bool:
    """Whether this machine has an address; a name may have one of IPv6 where no network speaks it."""
    try:
        _take(family, (address[0], 0, *address[2:])).close()
    except OSError:
        return False
    return True


def _cannot_listen(settings: ServingSettings, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot listen at {settings.host} port {settings.port} ({error.strerror or error}): "
        "give another --port or --host, or stop what listens there"
    )
