"""Routes that write: ``/v1/chat/completions`` and ``/v1/completions``, streamed or whole."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from slm.serving.answering import Desk, Listener
from slm.serving.answers import ChatCompletion, TextCompletion, new_id, now
from slm.serving.refusals import Refused, refuse
from slm.serving.schema import ChatRequest, CompletionRequest
from slm.serving.work import Decided, Finished, Piece, TokenChance
from slm.serving.writing import BROKEN


def completion_router(desk: Desk) -> APIRouter:
    """Both routes."""
    router = APIRouter(prefix="/v1", tags=["completions"])

    @router.post("/chat/completions", response_model=ChatCompletion)
    async def chat(request: Request, body: ChatRequest) -> Response:
        """Answer a conversation from the knowledge it needs."""
        wish = body.wish_for(body.stream)
        desk.note_prompts(request, [body.prompt])
        listeners = await desk.submit([body.prompt], body.model, wish, "messages")
        head = _head("chatcmpl", "chat.completion", body.model)
        if body.stream:
            return await _stream(desk, request, listeners, head, body.include_usage, is_chat=True)
        return await _whole(desk, request, listeners, head, is_chat=True)

    @router.post("/completions", response_model=TextCompletion)
    async def complete(request: Request, body: CompletionRequest) -> Response:
        """Answer one prompt or several, each from the knowledge it needs."""
        wish = body.wish_for(body.stream)
        desk.note_prompts(request, body.prompts)
        listeners = await desk.submit(body.prompts, body.model, wish, "prompt")
        head = _head("cmpl", "text_completion", body.model)
        if body.stream:
            return await _stream(desk, request, listeners, head, body.include_usage, is_chat=False)
        return await _whole(desk, request, listeners, head, is_chat=False)

    return router


def headers_of(decided: Decided) -> dict[str, str]:
    """The mixture as response headers."""
    return {
        "X-SLM-Mixture": ",".join(f"{task}={weight:.2f}" for task, weight in decided.mixture),
        "X-SLM-Abstained": str(decided.is_abstained).lower(),
        "X-SLM-Store-Version": str(decided.store_version),
    }


def knowing(decided: Decided, end: Finished | None = None) -> dict[str, Any]:
    """The field ``slm`` of an answer."""
    return {
        "mixture": [{"task": task, "weight": weight} for task, weight in decided.mixture],
        "is_abstained": decided.is_abstained,
        "store_version": decided.store_version,
        "confidence": None if end is None else end.confidence,
        "kind": None if end is None else end.kind,
    }


def _head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    return {"id": new_id(prefix), "object": kind, "created": now(), "model": model}


def usage_of(decided: Sequence[Decided], ends: Sequence[Finished]) -> dict[str, int]:
    """Tokens read and written."""
    read, written = sum(d.num_prompt_tokens for d in decided), sum(e.num_tokens for e in ends)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


async def _whole(
    desk: Desk, request: Request, listeners: Sequence[Listener], head: dict[str, Any], *, is_chat: bool
) -> Response:
    choices: list[dict[str, Any]] = []
    all_decided: list[Decided] = []
    all_ends: list[Finished] = []
    try:
        for listener in listeners:
            decided, pieces, ends = await desk.collect(request, listener)
            for end in ends:
                own = [piece for piece in pieces if piece.index == end.index]
                text, chances = "".join(p.text for p in own), [c for p in own for c in p.chances]
                if listener.asked.wish.num_logprobs is None:
                    chances = None  # type: ignore[assignment]
                choices.append(_choice(len(choices), text, chances, end, decided, is_chat))
            all_decided.append(decided)
            all_ends += ends
    finally:
        for listener in listeners:
            listener.cancel()
    first = all_decided[0]
    usage = usage_of(all_decided, all_ends)
    body = head | {"choices": choices, "usage": usage, "slm": knowing(first, all_ends[0])}
    return JSONResponse(body, headers=headers_of(first))


def _choice(
    index: int, text: str, chances: list[TokenChance] | None, end: Finished, decided: Decided, is_chat: bool
) -> dict[str, Any]:
    if is_chat:
        message = {"role": "assistant", "content": text, "refusal": None}
        logprobs = None if chances is None else _chat_logprobs(chances)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": end.reason}
    logprobs = None if chances is None else _text_logprobs(chances)
    known = knowing(decided, end)
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": end.reason, "slm": known}


def _chat_logprobs(chances: Sequence[TokenChance]) -> dict[str, Any]:
    def one(token: str, logprob: float) -> dict[str, Any]:
        # The bytes of a part of a character are not those of its text.
        known = None if BROKEN in token else list(token.encode())
        return {"token": token, "logprob": logprob, "bytes": known}

    content = [
        {**one(c.token, c.logprob), "top_logprobs": [one(*other) for other in c.others]} for c in chances
    ]
    return {"content": content, "refusal": None}


def _text_logprobs(chances: Sequence[TokenChance], offset: int = 0) -> dict[str, Any]:
    offsets = []
    for chance in chances:
        offsets.append(offset)
        offset += len(chance.token)
    return {
        "tokens": [c.token for c in chances],
        "token_logprobs": [c.logprob for c in chances],
        "top_logprobs": [dict(c.others) for c in chances],
        "text_offset": offsets,
    }


async def _stream(
    desk: Desk,
    request: Request,
    listeners: Sequence[Listener],
    head: dict[str, Any],
    has_usage: bool,
    *,
    is_chat: bool,
) -> Response:
    try:
        first = await listeners[0].first()
    except BaseException:
        for listener in listeners:
            listener.cancel()
        raise
    events = _events(desk, listeners, head, has_usage, is_chat=is_chat)
    headers = headers_of(first) | {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


async def _events(
    desk: Desk, listeners: Sequence[Listener], head: dict[str, Any], has_usage: bool, *, is_chat: bool
) -> AsyncIterator[str]:
    if is_chat:
        head = head | {"object": "chat.completion.chunk"}
    all_decided: list[Decided] = []
    all_ends: list[Finished] = []
    has_text = False
    try:
        for number, listener in enumerate(listeners):
            decided = listener.decided or await listener.first()
            own_ends: list[Finished] = []
            places = [0] * listener.asked.wish.num_answers
            offset = number * listener.asked.wish.num_answers
            if is_chat:
                for index in range(listener.asked.wish.num_answers):
                    delta = {"role": "assistant", "content": ""}
                    yield _line(head, _delta(index, delta, None, None, is_chat), decided)
            async for event in listener.rest():
                if isinstance(event, Finished):
                    own_ends.append(event)
                    last = _delta(event.index + offset, {}, None, event.reason, is_chat)
                    yield _line(head, last, decided, event)
                else:
                    if event.text and not has_text:
                        has_text = True
                        desk.metrics.first_token.observe(time.monotonic() - listener.asked.begun)
                    place = places[event.index]
                    places[event.index] += sum(len(chance.token) for chance in event.chances)
                    yield _line(head, _piece(event, offset, place, listener, is_chat), decided)
            desk.count(decided, own_ends)
            all_decided.append(decided)
            all_ends += own_ends
        if has_usage:
            usage = usage_of(all_decided, all_ends)
            yield f"data: {json.dumps(head | {'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"
    except Refused as refusal:
        yield f"data: {json.dumps(refusal.body)}\n\n"
    except Exception as error:  # noqa: BLE001 - the status is sent already, so the stream has to say it
        yield f"data: {json.dumps(refuse(error).body)}\n\n"
    finally:
        for listener in listeners:
            listener.cancel()


def _piece(piece: Piece, offset: int, place: int, listener: Listener, is_chat: bool) -> dict[str, Any]:
    logprobs = None
    if listener.asked.wish.num_logprobs is not None:
        chances = piece.chances
        logprobs = _chat_logprobs(chances) if is_chat else _text_logprobs(chances, place)
    return _delta(piece.index + offset, {"content": piece.text}, logprobs, None, is_chat)


def _delta(
    index: int, delta: dict[str, Any], logprobs: Any, reason: str | None, is_chat: bool
) -> dict[str, Any]:
    own = {"delta": delta} if is_chat else {"text": delta.get("content", "")}
    return {"index": index, **own, "logprobs": logprobs, "finish_reason": reason}


def _line(head: dict[str, Any], choice: dict[str, Any], decided: Decided, end: Finished | None = None) -> str:
    return f"data: {json.dumps(head | {'choices': [choice], 'slm': knowing(decided, end)})}\n\n"
