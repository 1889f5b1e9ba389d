"""The engine: one thread owns the backbone, admits requests between any two steps, and writes them together.

A request's knowledge is decided once, when its prompt is read, and kept to the end, whatever the store learns
or forgets meanwhile. Prompts are read in bounded batches, so a long one delays its neighbours little.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar, final

import torch

from slm.errors import CrowdedError, StoreError
from slm.knowledge import Knowledge
from slm.model import ScalableLM
from slm.serving.reading import Reading
from slm.serving.refusals import Refused, refuse, shutting_down, too_busy, too_late
from slm.serving.rows import Rows
from slm.serving.settings import ServingSettings
from slm.serving.work import Asked, Failed
from slm.store import TaskRecord

log = logging.getLogger("slm.serving")
_T = TypeVar("_T")


@final
class Engine:
    """Answers requests until it is stopped.

    Args:
        model: what is asked; nothing else may use its backbone meanwhile.
        settings: limits.
    """

    def __init__(self, model: ScalableLM, settings: ServingSettings) -> None:
        self.model, self.settings = model, settings
        self.knowledge: Knowledge = model.knowledge
        self.num_steps = 0
        self.adapters: dict[str, TaskRecord] = {}
        """Adapters loaded by name, each as the record of a task that no store holds."""
        self._queue: deque[Asked] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wakes = threading.Condition()
        self._is_draining = self._is_stopped = False
        self._rows = Rows(model)
        self._reading = Reading(model, settings, self._rows)
        self._thread = threading.Thread(target=self._run, name="slm-engine", daemon=True)

    def start(self) -> None:
        """Begin answering."""
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and not self._is_draining

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def num_running(self) -> int:
        """Answers being written."""
        return len(self._rows)

    def submit(self, asked: Asked) -> None:
        """Queue a request.

        Raises:
            Refused: the queue is full, or the server is stopping.
        """
        self.submit_all([asked])

    def submit_all(self, requests: list[Asked]) -> None:
        """Queue several requests, all or none.

        Raises:
            Refused: they do not fit into the queue, or the server is stopping.
        """
        with self._wakes:
            if self._is_draining:
                raise shutting_down()
            if len(self._queue) + len(requests) > self.settings.max_queue:
                raise too_busy(min(30, 1 + len(self._queue) // self.settings.max_rows), len(self._queue))
            self._queue.extend(requests)
            self._wakes.notify()

    def call(self, function: Callable[[], _T], *, is_bounded: bool = False) -> Future[_T]:
        """Run something that needs the backbone between two steps; keep it short.

        Args:
            function: is run in the engine's thread.
            is_bounded: a client asked for it, so it is refused where as many wait as may.

        Raises:
            Refused: too many wait, or the server is stopping.
        """
        future: Future[_T] = Future()
        with self._wakes:
            if self._is_draining:
                raise shutting_down()
            if is_bounded and len(self._calls) >= self.settings.max_queue:
                raise too_busy(1, len(self._calls))
            self._calls.append((function, future))
            self._wakes.notify()
        return future

    def adopt(self, knowledge: Knowledge) -> None:
        """Answer from another snapshot from the next prompt on; what is running keeps its own."""
        before, self.knowledge = self.knowledge, knowledge
        kept = {record.commit_id for record in knowledge.records}
        gone = [record for record in before.records if record.commit_id not in kept]
        if gone:
            with contextlib.suppress(Refused):  # a server that stops need not tidy up
                self.call(lambda: self._forget(gone))

    def newer_than(self, knowledge: Knowledge) -> Knowledge | None:
        """The store as it is now, adopted; None where a snapshot is the newest already."""
        if not self.model.reader.is_outdated(knowledge.version):
            return None
        newest = self.model.reader.newest()
        self.adopt(newest)
        return newest

    def _forget(self, gone: list[TaskRecord]) -> None:
        for record in gone:
            self.model.supply.drop(record)

    def drain(self, timeout_s: float) -> None:
        """Take nothing new, finish what is running, and stop; what is not done in time is refused."""
        with self._wakes:
            self._is_draining = True
            self._wakes.notify()
        self._thread.join(timeout_s)
        with self._wakes:
            self._is_stopped = True
            self._wakes.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        with self.model.backbone.lock, torch.inference_mode():
            while self._wait():
                try:
                    self._turn()
                except Exception as error:
                    log.exception("a step failed")
                    self._rows.fail(refuse(error))
        self._rows.fail(shutting_down())
        for asked in self._queue:
            asked.tell(Failed(shutting_down()))
        for _, future in self._calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(shutting_down())

    def _wait(self) -> bool:
        """Sleep until there is something to do; False when it is over."""
        with self._wakes:
            while not (
                self._queue or self._calls or len(self._rows) or self._is_draining or self._is_stopped
            ):
                self._rows.rest()
                self._wakes.wait()
            is_idle = not (self._queue or self._calls or len(self._rows))
            return not (self._is_stopped or (self._is_draining and is_idle))

    def _turn(self) -> None:
        if self._calls:
            function, future = self._calls.popleft()
            self._rows.release()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:  # noqa: BLE001 - whoever waits gets it
                    future.set_exception(error)
        admitted = self._admit()
        if admitted:
            self._read(admitted)
        self._rows.drop_dead()
        if len(self._rows):
            self._rows.step()
            self.num_steps += 1

    def _admit(self) -> list[Asked]:
        """The next requests whose prompts fit into one reading, in order of arrival."""
        admitted: list[Asked] = []
        self._drop_dead()
        free = self.settings.max_rows - len(self._rows)
        budget = self.settings.prefill_tokens
        while self._queue:
            asked = self._queue[0]
            if len(self._rows) >= asked.most_rows:  # it did not fit beside them
                break
            # A prompt longer than the budget is read alone, else it would never be.
            has_budget = len(asked.row.prompt) <= budget or not admitted
            if asked.wish.num_answers > free or not has_budget:
                break
            budget -= len(asked.row.prompt)
            free -= asked.wish.num_answers
            admitted.append(self._queue.popleft())
        return admitted

    def _drop_dead(self) -> None:
        """Let go of requests that nobody waits for any more, and of those that are late."""
        with self._wakes:
            dead = [asked for asked in self._queue if asked.is_cancelled or asked.is_late]
            if dead:
                self._queue = deque(a for a in self._queue if not (a.is_cancelled or a.is_late))
        for asked in dead:
            if not asked.is_cancelled:
                asked.tell(Failed(too_late(asked.deadline_s)))

    def _read(self, admitted: list[Asked]) -> None:
        try:
            self._reading(admitted, self.knowledge, self.adapters)
        except Exception as error:
            if len(admitted) > 1:
                for asked in admitted:
                    self._read([asked])
            elif isinstance(error, StoreError) and self._renew():
                self._read(admitted)
            elif isinstance(error, CrowdedError) and len(self._rows):
                admitted[0].most_rows = len(self._rows)
                with self._wakes:
                    self._queue.appendleft(admitted[0])
            else:
                if not isinstance(error, Refused):
                    log.warning("a request failed: %s", type(error).__name__, exc_info=True)
                admitted[0].tell(Failed(refuse(error)))

    def _renew(self) -> bool:
        """Answer from the store as it is now, where another process has forgotten a task meanwhile."""
        try:
            return self.newer_than(self.knowledge) is not None
        except StoreError:  # the store itself is gone: the first error says more
            return False
