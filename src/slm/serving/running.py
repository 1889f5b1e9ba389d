"""Running the app: sockets, timeouts for slow clients, TLS, logs, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
from socket import socket
from typing import Any, final

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from slm.serving.settings import ServingSettings

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

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
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


def run_app(app: FastAPI, settings: ServingSettings) -> None:
    """Serve until the process is told to stop; running requests are finished first."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    server_of(app, settings).run()
