"""The outermost layer: limits, timeouts, ids, who may come from where; nothing but answers ever leaves."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from typing import Any, final
from urllib.parse import urlsplit

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slm.serving.metrics import Metrics
from slm.serving.refusals import Refused, refuse
from slm.serving.settings import ServingSettings, is_loopback

log = logging.getLogger("slm.serving.access")
_ID = re.compile(r"[A-Za-z0-9._-]{1,100}")
_SAFE = ("GET", "HEAD", "OPTIONS")
UPLOADS = ("/v1/tasks",)
"""Paths whose bodies are streamed instead of being read first."""


@final
class Guard:
    """ASGI middleware around everything else.

    Args:
        app: what it guards.
        settings: limits.
        metrics: counts what passes.
    """

    def __init__(self, app: ASGIApp, settings: ServingSettings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        begun = time.perf_counter()
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        sent: dict[str, Any] = {"status": 0}

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent["status"] = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            self._check_origin(scope["method"], headers)
            bounded = await self._bound(scope, headers, receive)
            await self._app(scope, bounded, send_marked)
        except Exception as error:
            if not isinstance(error, Refused):
                log.exception("request %s failed", request_id)
            if not sent["status"]:
                await _send_refusal(refuse(error), send_marked)
        finally:
            self._note(scope, sent["status"], time.perf_counter() - begun, request_id)

    def _check_origin(self, method: str, headers: dict[str, str]) -> None:
        """Without keys only this machine's own names are served, and no other web page may post."""
        host = headers.get("host", "").lower()
        if self._settings.keys_file is None and not is_loopback(_host_name(host)):
            raise Refused(
                403, f"host {host[:100]!r} is not this machine: ask 127.0.0.1, or run with keys", "wrong_host"
            )
        origin = headers.get("origin")
        if origin is None or method in _SAFE or origin.lower() in self._settings.origins:
            return
        if _place_of(origin) != host:
            raise Refused(
                403, "other web pages may not send requests here: allow their origin", "wrong_origin"
            )

    async def _bound(self, scope: Scope, headers: dict[str, str], receive: Receive) -> Receive:
        """Read the body within limits, or, for an upload, limit it while it streams."""
        is_upload = scope["method"] == "POST" and scope["path"] in UPLOADS
        limit = self._settings.max_upload_bytes if is_upload else self._settings.max_body_bytes
        length = headers.get("content-length", "")
        if length.isdigit() and int(length[:20]) > limit:
            raise _too_long(limit)
        if is_upload:
            return self._counted(receive, limit)
        body = bytearray()
        try:
            with anyio.fail_after(self._settings.body_timeout_s):
                while True:
                    message = await receive()
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise _too_long(limit)
                    if message["type"] != "http.request" or not message.get("more_body", False):
                        break
        except TimeoutError:
            raise Refused(
                408,
                f"the body took longer than {self._settings.body_timeout_s:g} s: send it at once",
                "timeout",
            ) from None
        waiting = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return waiting.pop() if waiting else await receive()

        return replay

    def _counted(self, receive: Receive, limit: int) -> Receive:
        num_bytes = 0
        ends = time.monotonic() + 10 * self._settings.body_timeout_s

        async def counted() -> Message:
            nonlocal num_bytes
            try:
                with anyio.fail_after(min(self._settings.body_timeout_s, max(0.0, ends - time.monotonic()))):
                    message = await receive()
            except TimeoutError:
                raise Refused(408, "the upload took too long: send it faster", "timeout") from None
            num_bytes += len(message.get("body", b""))
            if num_bytes > limit:
                raise _too_long(limit)
            return message

        return counted

    def _note(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        route = getattr(scope.get("route"), "path", "(none)")
        self._metrics.requests.labels(route, str(status or 499)).inc()
        self._metrics.latency.labels(route).observe(seconds)
        line = {
            "request_id": request_id,
            "method": scope["method"],
            "route": route,
            "status": status or 499,
            "seconds": round(seconds, 4),
            "key": scope.get("state", {}).get("key_name"),
        }
        log.info(json.dumps(line | scope.get("state", {}).get("noted", {})))


def _host_name(host: str) -> str:
    return host.rpartition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]


def _place_of(origin: str) -> str | None:
    """Host and port of an origin; None where it is not one."""
    try:
        return urlsplit(origin.lower()).netloc
    except ValueError:
        return None


def _too_long(limit: int) -> Refused:
    return Refused(413, f"the body is longer than {limit} bytes: send less at once", "body_too_long")


async def _send_refusal(refusal: Refused, send: Send) -> None:
    body = json.dumps(refusal.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in refusal.headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
