"""In front of a bigger engine: requests are routed here and answered there, by adapters loaded by name.

Each request's knowledge is one exported adapter: that of its likeliest task, or a mixture registered
beforehand where exactly its tasks were retrieved. The upstream is vLLM, SGLang or another slm.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from typing import Any, final

import httpx2
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from slm.errors import SlmError
from slm.exchange import export_tasks
from slm.knowledge import Knowledge, shares_of
from slm.serving.answering import Desk
from slm.serving.completions import headers_of, knowing
from slm.serving.refusals import Refused, refuse
from slm.serving.schema import ChatRequest, CompletionRequest
from slm.serving.settings import ServingSettings
from slm.serving.work import AUTO, Decided
from slm.store import TaskRecord

_TOLERANCE = 0.05
"""By how much each weight may differ from a registered mixture's."""

Weights = Mapping[str, float]


@final
class Upstream:
    """Routes requests to another server.

    Args:
        desk: decides what a request needs.
        settings: where the other server is, and the folder it shares with this one.
    """

    def __init__(self, desk: Desk, settings: ServingSettings) -> None:
        assert settings.upstream is not None
        assert settings.adapters_folder is not None
        self._desk, self._settings = desk, settings
        self._folder = settings.adapters_folder.absolute()
        key = os.environ.get("SLM_UPSTREAM_KEY")
        self._client = httpx2.AsyncClient(
            base_url=settings.upstream.rstrip("/"),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(settings.deadline_s, connect=10.0),
        )
        self._base: str | None = None
        self._loaded: dict[str, asyncio.Task[None]] = {}

    async def stop(self) -> None:
        """Close connections."""
        await self._client.aclose()

    async def answer(self, request: Request, body: ChatRequest | CompletionRequest, prompt: Any) -> Response:
        """Route one request, have it answered, and pass the answer on.

        Raises:
            Refused: the request cannot be used, or nobody answers upstream.
        """
        await self._desk.check([prompt], "messages" if isinstance(body, ChatRequest) else "prompt")
        given = json.loads(await request.body())
        for is_last in (False, True):
            decided, chosen = await self._choose(body.model, prompt)
            name = await self._provide(chosen) if chosen else await self._base_name()
            response, stack = await self._send(request.url.path, given | {"model": name})
            if response.status_code == 404 and not is_last:
                # It was restarted, or dropped the adapter: load it, or ask what it is called, once more.
                self._loaded.pop(name, None)
                self._base = None
                await stack.aclose()
                continue
            return await self._pass_on(response, stack, body, decided)
        raise AssertionError

    async def _choose(self, model: str, prompt: Any) -> tuple[Decided, Weights]:
        """What the request needs, and which tasks of it its adapter is made of."""
        task, known = self._desk.resolve(model), self._desk.engine.knowledge
        if task is not None:
            return Decided(((task, 1.0),), False, known.version, 0), {task: 1.0}
        if model != AUTO or known.retriever is None:
            return Decided((), model == AUTO, known.version, 0), {}
        (mixture,) = await self._desk.call([lambda: self._mixture(known, prompt)])
        decided = Decided(tuple(mixture.items()), not mixture, known.version, 0)
        self._desk.metrics.count_mixture(decided.mixture, decided.is_abstained)
        if not mixture:
            return decided, {}
        for registered in self._settings.mixtures:
            if registered.keys() == mixture.keys() and all(
                abs(weight - mixture[name]) <= _TOLERANCE for name, weight in registered.items()
            ):
                return decided, registered
        return decided, {next(iter(mixture)): 1.0}

    def _mixture(self, known: Knowledge, prompt: Any) -> dict[str, float]:
        assert known.retriever is not None
        shares = shares_of(known.retriever(self._desk.engine.model.queries([prompt])), known.records)[0]
        weights: dict[str, float] = {}
        for share in shares:
            weights[share.record.name] = weights.get(share.record.name, 0.0) + share.weight
        return dict(sorted(weights.items(), key=lambda item: -item[1]))

    async def _provide(self, weights: Weights) -> str:
        """The name under which the upstream knows these tasks; loaded once, however many ask."""
        records = {record.name: record for record in self._desk.engine.knowledge.records}
        name = adapter_name(weights, records)
        loading = self._loaded.get(name)
        if loading is None:
            loading = self._loaded[name] = asyncio.create_task(self._load(name, weights))
        try:
            await asyncio.shield(loading)
        except (SlmError, Refused):
            self._loaded.pop(name, None)
            raise
        return name

    async def _load(self, name: str, weights: Weights) -> None:
        folder = self._folder / name
        if not folder.is_dir():
            model = self._desk.engine.model
            await asyncio.to_thread(export_tasks, model.backbone, model.store, dict(weights), folder, False)
        body = {"lora_name": name, "lora_path": str(folder)}
        response = await self._post("/v1/load_lora_adapter", body)
        if response.status_code >= 300 and "already" not in response.text:
            raise _bad_gateway(f"does not load adapters ({response.status_code})")

    async def _base_name(self) -> str:
        """What the upstream calls the backbone alone."""
        if self._base is None:
            try:
                listed = (await self._client.get("/v1/models")).json()["data"]
                self._base = next(str(card["id"]) for card in listed if card["id"] != AUTO)
            except (httpx2.HTTPError, ValueError, KeyError, TypeError, StopIteration):
                raise _bad_gateway("lists no models") from None
        return self._base

    async def _post(self, path: str, body: Mapping[str, Any]) -> httpx2.Response:
        try:
            return await self._client.post(path, json=body)
        except httpx2.HTTPError as error:
            raise _bad_gateway(f"cannot be reached ({type(error).__name__})") from None

    async def _send(self, path: str, body: Mapping[str, Any]) -> tuple[httpx2.Response, AsyncExitStack]:
        stack = AsyncExitStack()
        try:
            response = await stack.enter_async_context(self._client.stream("POST", path, json=body))
        except httpx2.HTTPError as error:
            await stack.aclose()
            raise _bad_gateway(f"cannot be reached ({type(error).__name__})") from None
        return response, stack

    async def _pass_on(
        self,
        response: httpx2.Response,
        stack: AsyncExitStack,
        body: ChatRequest | CompletionRequest,
        decided: Decided,
    ) -> Response:
        headers = headers_of(decided)
        if body.stream and response.status_code == 200:
            return StreamingResponse(
                _through(response, stack, {"model": body.model}, knowing(decided)),
                media_type="text/event-stream",
                headers=headers,
            )
        try:
            told = json.loads(await response.aread())
        except (httpx2.HTTPError, ValueError):
            raise _bad_gateway("broke off its answer") from None
        finally:
            await stack.aclose()
        if response.status_code == 200:
            told |= {"model": body.model, "slm": knowing(decided)}
        return JSONResponse(told, response.status_code, headers=headers)


def adapter_name(weights: Weights, records: Mapping[str, TaskRecord]) -> str:
    """A name that changes when a task is learned anew.

    Raises:
        Refused: a task is gone.
    """
    missing = [name for name in weights if name not in records]
    if missing:
        raise Refused(503, f"task {missing[0]!r} has just been forgotten: try again", "task_not_found")
    parts = [(name, weight, records[name].commit_id[:8]) for name, weight in weights.items()]
    if len(parts) == 1:
        return f"{parts[0][0]}-{parts[0][2]}"
    return "+".join(f"{name}-{commit}-{weight:g}" for name, weight, commit in parts)


async def _through(
    response: httpx2.Response, stack: AsyncExitStack, head: Mapping[str, Any], knowing: Mapping[str, Any]
) -> AsyncIterator[bytes]:
    """The upstream's own events, as they come; leaving them closes the connection, so it stops writing too.

    Args:
        response: streamed by the upstream.
        stack: closes it.
        head: of every event, instead of the upstream's own.
        knowing: what was retrieved, for every event that has a choice.
    """
    try:
        rest = b""
        async for chunk in response.aiter_bytes():
            # Not by `aiter_lines`: it ends lines at characters that may stand in a text.
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield _told(line, head, knowing) + b"\n"
        if rest:
            yield _told(rest, head, knowing)
    except httpx2.HTTPError as error:
        refusal = _bad_gateway(f"broke off its answer ({type(error).__name__})")
        yield f"data: {json.dumps(refuse(refusal).body)}\n\n".encode()
    finally:
        await stack.aclose()


def _told(line: bytes, head: Mapping[str, Any], knowing: Mapping[str, Any]) -> bytes:
    """One line of a stream; what is no event of an answer stays as it is."""
    try:
        event = json.loads(line.removeprefix(b"data:")) if line.startswith(b"data:") else None
    except ValueError:
        event = None
    if not isinstance(event, dict) or "choices" not in event:
        return line
    event |= head
    if event["choices"]:
        event["slm"] = knowing
    return f"data: {json.dumps(event)}".encode()


def _bad_gateway(what: str) -> Refused:
    return Refused(502, f"the upstream server {what}: see whether it runs", "upstream_unavailable")


def upstream_router(upstream: Upstream) -> APIRouter:
    """The routes that write, answered by the upstream."""
    router = APIRouter(prefix="/v1", tags=["completions"])

    @router.post("/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        """Route a conversation."""
        return await upstream.answer(request, body, body.prompt)

    @router.post("/completions")
    async def complete(request: Request, body: CompletionRequest) -> Response:
        """Route one prompt."""
        if len(body.prompts) != 1:
            text = "a routed request has one prompt, got several: send one request for each"
            raise Refused(400, text, "too_many_inputs", "prompt")
        return await upstream.answer(request, body, body.prompts[0])

    return router
