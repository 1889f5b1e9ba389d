"""Teaching jobs: processes of their own that learn a task and commit it to the store.

The server never learns. It starts ``python -m slm.cli.main``'s neighbour :mod:`slm.learning.job`, reads what
that process tells of its progress, and takes the new knowledge from the store like any other replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from slm.serving.refusals import Refused

KEPT_JOBS = 200
"""Finished jobs that are remembered."""
_JOB_MODULE = "slm.learning.job"
_LINE_BYTES = 1 << 20


@dataclass(slots=True)
class Job:
    """One task being learned.

    Attributes:
        task: its name.
        spec: what the process is told.
        folder: the quarantine that holds the upload.
        state: queued, running, succeeded, failed or cancelled.
        step: optimizer steps done.
        num_steps: of how many; None before it is known.
        error: why it failed, for a person.
        report: what learning gave.
    """

    task: str
    spec: Mapping[str, Any]
    folder: Path
    id: str = field(default_factory=lambda: f"job-{uuid.uuid4().hex}")
    state: str = "queued"
    step: int = 0
    num_steps: int | None = None
    error: str | None = None
    report: dict[str, Any] | None = None
    created: float = field(default_factory=time.time)
    finished: float | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    process: asyncio.subprocess.Process | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen."""
        return self.finished is not None

    def card(self) -> dict[str, Any]:
        """As it is told to clients."""
        share = self.step / self.num_steps if self.num_steps else 0.0
        return {
            "id": self.id,
            "object": "job",
            "task": self.task,
            "state": self.state,
            "progress": 1.0 if self.state == "succeeded" else min(share, 0.99),
            "step": self.step,
            "num_steps": self.num_steps,
            "error": self.error,
            "created": self.created,
            "finished": self.finished,
            "report": self.report,
        }

    def note(self) -> None:
        """Wake whoever watches."""
        self.changed.set()
        self.changed = asyncio.Event()


@final
class Teacher:
    """Runs jobs one after the other.

    Args:
        store: folder of the store.
        max_jobs: that may wait.
        on_commit: called after a job may have changed the store.
    """

    def __init__(self, store: Path, max_jobs: int, on_commit: Any) -> None:
        self._store, self._max_jobs, self._on_commit = store, max_jobs, on_commit
        self.quarantine = Path(tempfile.mkdtemp(prefix="slm-quarantine-"))
        self._jobs: dict[str, Job] = {}
        self._waiting: asyncio.Queue[Job] = asyncio.Queue()
        self._worker: asyncio.Task[None] | None = None
        self._is_closing = False

    def start(self) -> None:
        """Begin with the first job."""
        self._worker = asyncio.create_task(self._work())

    def hang_up(self) -> None:
        """Tell whoever watches a job how it stands, and let them go: the server is about to stop."""
        self._is_closing = True
        for job in self._jobs.values():
            job.note()

    async def stop(self) -> None:
        """End the running job, and remove everything that was uploaded."""
        if self._worker is not None:
            self._worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._worker
        await asyncio.to_thread(shutil.rmtree, self.quarantine, True)

    def new_folder(self) -> Path:
        """A place for an upload.

        Raises:
            Refused: too many jobs are waiting.
        """
        num_open = sum(not job.is_over for job in self._jobs.values())
        if num_open >= self._max_jobs:
            text = f"{num_open} teaching jobs are waiting already: try again later"
            raise Refused(429, text, "too_many_jobs", headers={"Retry-After": "30"})
        folder = self.quarantine / uuid.uuid4().hex
        folder.mkdir(mode=0o700)
        return folder

    def submit(self, task: str, spec: Mapping[str, Any], folder: Path) -> Job:
        """Queue a job.

        Raises:
            Refused: a job for a task of this name is under way.
        """
        if any(job.task == task and not job.is_over for job in self._jobs.values()):
            text = f"task {task!r} is being learned already: wait for it, or cancel it"
            raise Refused(409, text, "task_exists", "name")
        job = Job(task, dict(spec) | {"store": str(self._store), "name": task}, folder)
        self._jobs[job.id] = job
        over = [job.id for job in self._jobs.values() if job.is_over]
        for gone in over[: max(0, len(over) - KEPT_JOBS)]:
            del self._jobs[gone]
        self._waiting.put_nowait(job)
        return job

    def all(self) -> list[Job]:
        """Every job remembered, newest first."""
        return list(self._jobs.values())[::-1]

    def job(self, job_id: str) -> Job:
        """One job.

        Raises:
            Refused: there is none of this id.
        """
        if job_id not in self._jobs:
            text = f"job {job_id[:100]!r} does not exist: list /v1/jobs to see the others"
            raise Refused(404, text, "job_not_found", "id")
        return self._jobs[job_id]

    async def cancel(self, job: Job) -> None:
        """Stop a job; the store is as it was, unless it had committed already."""
        if job.is_over:
            return
        was_running = job.state == "running"
        job.state = "cancelled"
        if was_running and job.process is not None:
            with contextlib.suppress(ProcessLookupError):
                job.process.terminate()
        else:
            await self._close(job)

    async def watch(self, job: Job) -> AsyncIterator[dict[str, Any]]:
        """Its card now and after every change, until it is over or the server stops."""
        while True:
            changed = job.changed
            yield job.card()
            if job.is_over or self._is_closing:
                return
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(changed.wait(), 15)

    async def _work(self) -> None:
        while True:
            job = await self._waiting.get()
            if job.is_over:
                continue
            try:
                await self._run(job)
            except asyncio.CancelledError:
                await _kill(job)
                raise
            except Exception as error:  # noqa: BLE001 - the next job must still run
                job.state, job.error = (
                    "failed",
                    f"the job's process could not be run ({type(error).__name__})",
                )
            await self._close(job)

    async def _run(self, job: Job) -> None:
        job.state = "running"
        job.note()
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
        job.process = process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", _JOB_MODULE),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=environment,
            cwd=job.folder,
            limit=_LINE_BYTES,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(job.spec).encode() + b"\n")
        process.stdin.close()
        async for line in process.stdout:
            self._hear(job, line)
        await process.wait()
        if job.state == "running":
            done = process.returncode == 0 and job.report is not None
            job.state = "succeeded" if done else "failed"
            if not done and job.error is None:
                job.error = f"the job's process ended with code {process.returncode} and no report"

    def _hear(self, job: Job, line: bytes) -> None:
        try:
            told = json.loads(line)
        except ValueError:
            return
        if not isinstance(told, dict):
            return
        if "step" in told:
            job.step, job.num_steps = int(told["step"]), int(told["num_steps"])
        if "error" in told:
            job.error = str(told["error"]).replace(str(job.folder) + os.sep, "")
        if "report" in told:
            job.report = told["report"]
        job.note()

    async def _close(self, job: Job) -> None:
        job.finished = time.time()
        await asyncio.to_thread(shutil.rmtree, job.folder, True)
        if job.state == "succeeded":
            await self._on_commit()
        job.note()


async def _kill(job: Job) -> None:
    job.state = "cancelled"
    if job.process is not None and job.process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            job.process.kill()
        await job.process.wait()
