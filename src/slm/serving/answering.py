"""From a request to its events: tokenized, queued, and listened to, however it ends."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, final

from fastapi import Request

from slm.backbone.backbone import BackboneKind
from slm.errors import DataError
from slm.serving.engine import Engine
from slm.serving.metrics import Metrics
from slm.serving.refusals import Refused, refuse, too_late, unknown_model
from slm.serving.settings import ServingSettings
from slm.serving.work import AUTO, Asked, Decided, Event, Failed, Finished, Piece, Wish

_T = TypeVar("_T")


@final
class Listener:
    """One prompt's events, as they come from the engine's thread.

    Args:
        asked: the request; its ``tell`` is set here.
        loop: where the events are read.
    """

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.decided: Decided | None = None
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        asked.tell = self._tell

    def _tell(self, event: Event) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop has ended, and with it whoever listened
            self.asked.is_cancelled = True

    async def first(self) -> Decided:
        """Wait for the decision.

        Raises:
            Refused: the request failed before.
        """
        event = await self._next()
        assert isinstance(event, Decided)
        self.decided = event
        return event

    async def rest(self) -> AsyncIterator[Piece | Finished]:
        """Everything after the decision, until the last answer is finished.

        Raises:
            Refused: the request failed.
        """
        left = self.asked.wish.num_answers
        while left:
            event = await self._next()
            assert isinstance(event, (Piece, Finished))
            left -= isinstance(event, Finished)
            yield event

    def cancel(self) -> None:
        """Nobody listens any more."""
        self.asked.is_cancelled = True

    async def _next(self) -> Event:
        # The engine keeps deadlines; this one is for an engine that hangs.
        left = self.asked.deadline_s + 5 - (time.monotonic() - self.asked.begun)
        try:
            event = await asyncio.wait_for(self._events.get(), max(0.0, left))
        except TimeoutError:
            self.cancel()
            raise too_late(self.asked.deadline_s) from None
        if isinstance(event, Failed):
            raise event.refusal
        return event


@final
class Desk:
    """Takes prompts to the engine.

    Args:
        engine: answers them.
        settings: limits.
        metrics: counts them.
    """

    def __init__(self, engine: Engine, settings: ServingSettings, metrics: Metrics) -> None:
        self.engine, self.settings, self.metrics = engine, settings, metrics
        self.name = model_name(engine.model.backbone.source)
        self._lock = threading.Lock()  # a tokenizer takes one caller at a time

    @property
    def longest_answer(self) -> int | None:
        """The longest answer that may be asked for, in tokens; None where another server answers."""
        if self.settings.upstream is not None:
            return None
        # Where the answer follows its prompt in one window, the prompt has one token of it at least.
        return min(self.settings.max_tokens, self.engine.model.backbone.window - self._is_in_one_window)

    @property
    def _is_in_one_window(self) -> bool:
        backbone = self.engine.model.backbone
        return not backbone.renderer.is_apart and backbone.kind is not BackboneKind.ENCODER

    def resolve(self, model: str) -> str | None:
        """The task that a model's name forces; None where it forces none.

        Raises:
            Refused: there is no such model.
        """
        if model in (AUTO, self.name):
            return None
        if model in self.engine.adapters:
            return model
        task = model[len(self.name) + 1 :] if model.startswith(f"{self.name}:") else None
        if task is None or all(task != record.name for record in self.engine.knowledge.records):
            raise unknown_model(model)
        return task

    async def submit(
        self, prompts: Sequence[Any], model: str, wish: Wish, param: str, *, is_labelling: bool = False
    ) -> list[Listener]:
        """Queue some prompts, all or none.

        Raises:
            Refused: an unknown model, a prompt that cannot be used, too many tokens, a full queue.
        """
        task, limits = self.resolve(model), self.settings
        if wish.max_tokens is not None and wish.max_tokens > limits.max_tokens:
            raise Refused(
                400,
                f"max_tokens must be in 1..{limits.max_tokens}, got {wish.max_tokens}: lower it",
                "invalid_value",
                "max_tokens",
            )
        if wish.num_answers > limits.max_rows:
            raise Refused(400, f"n must be in 1..{limits.max_rows}: lower it", "invalid_value", "n")
        rows = await self.check(prompts, param, wish)
        listeners = []
        for prompt, row in zip(prompts, rows, strict=True):
            asked = Asked(prompt, model, task, wish, lambda _: None, limits.deadline_s, row, is_labelling)
            listeners.append(Listener(asked))
        self.engine.submit_all([listener.asked for listener in listeners])
        return listeners

    async def check(self, prompts: Sequence[Any], param: str, wish: Wish | None = None) -> list[Any]:
        """Tokenize prompts, and refuse those that cannot be used.

        Raises:
            Refused: there are too many, or one is empty, too long, or no conversation.
        """
        most = min(self.settings.max_inputs, self.settings.max_queue)
        if len(prompts) > most:
            text = f"{param} has {len(prompts)} texts, at most {most} are taken: send fewer"
            raise Refused(400, text, "too_many_inputs", param)
        return await asyncio.to_thread(self._tokenize, prompts, wish or Wish(), param)

    async def call(self, functions: Sequence[Callable[[], _T]]) -> list[_T]:
        """Have the engine run some functions one after the other, within the deadline of one request.

        Raises:
            Refused: too many wait already, or the deadline has passed.
        """

        async def each() -> list[_T]:
            return [
                await asyncio.wrap_future(self.engine.call(function, is_bounded=True))
                for function in functions
            ]

        try:
            return await asyncio.wait_for(each(), self.settings.deadline_s)
        except TimeoutError:
            raise too_late(self.settings.deadline_s) from None

    def note_prompts(self, request: Request, prompts: Sequence[Any]) -> None:
        """Put prompts into the log's line of a request, where that was asked for."""
        if self.settings.is_logging_prompts:
            request.state.noted = {"prompts": list(prompts)}

    async def collect(
        self, request: Request, listener: Listener
    ) -> tuple[Decided, list[Piece], list[Finished]]:
        """Wait for everything of one prompt; give up when the client leaves.

        Raises:
            Refused: the request failed, or nobody waits any more.
        """
        pieces: list[Piece] = []
        ends: list[Finished] = []

        async def listen() -> Decided:
            decided = await listener.first()
            async for event in listener.rest():
                if isinstance(event, Finished):
                    ends.append(event)
                else:
                    pieces.append(event)
            return decided

        listening = asyncio.ensure_future(listen())
        leaving = asyncio.ensure_future(has_left(request))
        try:
            await asyncio.wait({listening, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not listening.done():
                raise Refused(499, "the client closed the request", "client_closed_request")
            decided = listening.result()
        finally:
            leaving.cancel()
            if not listening.done():
                listening.cancel()
            listener.cancel()
        self.count(decided, ends)
        return decided, pieces, sorted(ends, key=lambda end: end.index)

    def count(self, decided: Decided, ends: Sequence[Finished]) -> None:
        """Note what an answer took."""
        self.metrics.count_mixture(decided.mixture, decided.is_abstained)
        self.metrics.prompt_tokens.inc(decided.num_prompt_tokens)
        self.metrics.written_tokens.inc(sum(end.num_tokens for end in ends))

    def _tokenize(self, prompts: Sequence[Any], wish: Wish, param: str) -> list[Any]:
        backbone, rows = self.engine.model.backbone, []
        wanted = wish.max_tokens or 1
        for number, prompt in enumerate(prompts, start=1):
            where = param if len(prompts) == 1 else f"{param} {number}"
            try:
                with self._lock:
                    row = backbone.row(prompt, is_truncating=False, where=where)
            except DataError as error:
                text = str(error).split(": shorten it")[0]
                is_long = "window" in text
                code = "context_length_exceeded" if is_long else "invalid_value"
                raise Refused(400, f"{text}: shorten it" if is_long else text, code, param) from None
            except Exception as error:
                if type(error).__module__.startswith("jinja2"):  # what a chat template will not take
                    told = " ".join(str(error).split())[:200]
                    message = f"{where} does not fit the backbone's chat template ({told}): correct it"
                    raise Refused(400, message, "invalid_value", param) from None
                raise refuse(error) from error
            num_tokens = len(row.prompt)
            if self._is_in_one_window and num_tokens + wanted > backbone.window:
                raise Refused(
                    400,
                    f"{where} has {num_tokens} tokens and max_tokens is {wanted}, the window holds "
                    f"{backbone.window}: shorten one of them",
                    "context_length_exceeded",
                    param,
                )
            rows.append(row)
        return rows


async def has_left(request: Request) -> None:
    """Return when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def model_name(source: str) -> str:
    """What clients call a backbone: its alias or hub id, or the last part of its path."""
    path = Path(source)
    name = path.name if path.is_absolute() or path.exists() else source
    return name.removesuffix(".gguf") or "backbone"
