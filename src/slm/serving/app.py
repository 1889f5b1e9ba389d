"""The app: routes, who may call them, and what starts and stops with it."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, final

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

import slm
from slm.errors import SlmError
from slm.model import ScalableLM
from slm.serving.answering import Desk
from slm.serving.answers import ErrorBody
from slm.serving.completions import completion_router
from slm.serving.engine import Engine
from slm.serving.guard import Guard
from slm.serving.inspecting import inspection_router
from slm.serving.keys import Keys, read_keys
from slm.serving.managing import adapter_router, task_router, teaching_router
from slm.serving.metrics import Metrics
from slm.serving.refusals import Refused, invalid_body, refuse, too_late
from slm.serving.settings import ServingSettings
from slm.serving.teaching import Teacher

if TYPE_CHECKING:
    from slm.serving.upstream import Upstream

log = logging.getLogger("slm.serving")


@final
class Server:
    """Everything one server is made of.

    Args:
        model: what is asked; the server is its only user from now on.
        settings: limits and places.
    """

    def __init__(self, model: ScalableLM, settings: ServingSettings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.keys: Keys = read_keys(settings.keys_file)
        self.engine = Engine(model, settings)
        self.desk = Desk(self.engine, settings, self.metrics)
        self.metrics.watch(self.engine)
        self.teacher = Teacher(model.store.path, settings.max_jobs, self.refresh)
        self.upstream: Upstream | None = None
        if settings.upstream is not None:
            from slm.serving.upstream import Upstream

            self.upstream = Upstream(self.desk, settings)
        self._refreshing = asyncio.Lock()

    async def refresh(self) -> None:
        """Take the store's newest version, if it is another than that in use."""
        async with self._refreshing:
            await asyncio.to_thread(self._refresh)

    def _refresh(self) -> None:
        model = self.engine.model
        if model.store.version == self.engine.knowledge.version:
            return
        self.engine.adopt(model.reader.newest())

    async def watch(self) -> None:
        """Look at the store again and again: other processes teach and forget too; trouble is told once."""
        told = ""
        while True:
            await asyncio.sleep(self.settings.poll_s)
            try:
                await self.refresh()
            except Exception as error:  # noqa: BLE001 - what is in use still answers; the next look may do
                trouble = " ".join(str(error).split())
                if trouble != told:
                    log.warning("the store could not be read again: %s", trouble)
                told = trouble
            else:
                if told:
                    log.info("the store can be read again")
                told = ""

    @contextlib.asynccontextmanager
    async def running(self, app: FastAPI) -> AsyncIterator[None]:
        """Start with the app and stop with it."""
        self.engine.start()
        self.teacher.start()
        watching = asyncio.create_task(self.watch())
        try:
            yield
        finally:
            watching.cancel()
            await self.teacher.stop()
            if self.upstream is not None:
                await self.upstream.stop()
            await asyncio.to_thread(self.engine.drain, self.settings.grace_s)


def create_app(model: ScalableLM, settings: ServingSettings) -> FastAPI:
    """The app of one server.

    Raises:
        ConfigError: the keys file cannot be used.
    """
    server = Server(model, settings)
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorBody} for status in (400, 401, 403, 404, 408, 409, 413, 429, 503, 504)
    }
    app = FastAPI(
        title="slm",
        version=slm.__version__,
        lifespan=server.running,
        responses=refusals,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
    )
    app.state.server = server
    ask, teach, admin = (_scope(server.keys, scope) for scope in ("ask", "teach", "admin"))
    if server.upstream is not None:
        from slm.serving.upstream import upstream_router

        app.include_router(upstream_router(server.upstream), dependencies=[ask])
    else:
        app.include_router(completion_router(server.desk), dependencies=[ask])
    app.include_router(inspection_router(server.desk), dependencies=[ask])
    app.include_router(task_router(server.desk), dependencies=[ask])
    teaching = teaching_router(server.desk, server.teacher, settings, server.refresh)
    app.include_router(teaching, dependencies=[teach])
    app.include_router(adapter_router(server.desk, settings), dependencies=[admin])
    _add_health(app, server, ask)
    _add_page(app, server, ask)
    _add_handlers(app)
    app.add_middleware(Guard, settings=settings, metrics=server.metrics)
    if settings.origins:  # outside the guard, so that pages can read what it refuses
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["X-SLM-Mixture", "X-SLM-Abstained", "X-SLM-Store-Version", "X-Request-Id"],
        )
    return app


def _scope(keys: Keys, scope: str) -> Any:
    def check(request: Request) -> None:
        request.state.key_name = keys.check(request.headers.get("authorization"), scope)

    return Depends(check)


def _add_health(app: FastAPI, server: Server, ask: Any) -> None:
    @app.get("/health", tags=["health"])
    async def health() -> dict[str, str]:
        """Whether the process is alive."""
        return {"status": "ok"}

    @app.get("/ready", tags=["health"], responses={503: {"model": ErrorBody}})
    async def ready() -> dict[str, Any]:
        """Whether requests are answered."""
        if not server.engine.is_running:
            raise Refused(503, "the engine is not running: wait, or restart the server", "not_ready")
        return {"status": "ok", "store_version": server.engine.knowledge.version}

    @app.get("/metrics", tags=["health"], dependencies=[ask], response_class=Response)
    async def metrics() -> Response:
        """What Prometheus reads."""
        return Response(server.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_page(app: FastAPI, server: Server, ask: Any) -> None:
    """The page at ``/`` and what it draws, where they are installed."""
    if importlib.util.find_spec("slm.serving.map_routes") is not None:
        map_router = importlib.import_module("slm.serving.map_routes").map_router
        surveyor_of = importlib.import_module("slm.serving.surveyor").Surveyor

        def queries(texts: Any) -> Any:
            asked = server.engine.call(lambda: server.engine.model.queries(texts), is_bounded=True)
            try:
                return asked.result(server.settings.deadline_s)
            except TimeoutError:
                asked.cancel()
                raise too_late(server.settings.deadline_s) from None

        is_encoder = server.engine.model.backbone.kind.value == "encoder"
        metric = "accuracy" if is_encoder else "token accuracy"
        surveyor = surveyor_of(lambda: server.engine.knowledge, queries, metric, server.engine.newer_than)
        app.include_router(map_router(surveyor), dependencies=[ask])
    if importlib.util.find_spec("slm.serving.page") is not None:
        page = importlib.import_module("slm.serving.page")
        app.include_router(page.page_router(page.load_page()))


def _add_handlers(app: FastAPI) -> None:
    """Every failure becomes a body of OpenAI's shape."""

    def send(refusal: Refused) -> Response:
        return JSONResponse(refusal.body, refusal.status, headers=dict(refusal.headers))

    async def refused(_: Request, error: Exception) -> Response:
        return send(refuse(error))

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return send(invalid_body(error.errors()))

    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed", 400: "invalid_body"}.get(
            error.status_code, "error"
        )
        return send(Refused(error.status_code, str(error.detail), code, None, dict(error.headers or {})))

    handlers: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
        Refused: refused,
        SlmError: refused,
        RequestValidationError: invalid,
        HTTPException: http,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
