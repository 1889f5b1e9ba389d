"""Routes that change what is known: tasks, teaching jobs, loaded adapters."""

from __future__ import annotations

import asyncio
import difflib
import json
import shutil
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi import Path as PathParameter
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.datastructures import FormData, UploadFile

from slm.backbone.backbone import BackboneKind
from slm.errors import TaskError
from slm.increments.increment import Increment
from slm.serving.answering import Desk
from slm.serving.answers import Forgotten, JobCard, JobList, TaskCard, TaskList
from slm.serving.refusals import Refused, unknown_task
from slm.serving.schema import AdapterRequest
from slm.serving.settings import ServingSettings
from slm.serving.teaching import Job, Teacher
from slm.serving.uploads import check_examples, save_examples, unpack_adapter
from slm.store import TaskRecord
from slm.store.adapters import read_peft_adapter
from slm.store.manifest import utc_now
from slm.tasks.task import check_name

Name = Annotated[str, PathParameter(max_length=200)]
_FORM: dict[str, Any] = {
    "type": "object",
    "required": ["name", "file"],
    "properties": {
        "name": {"type": "string", "description": "What to call the task."},
        "file": {"type": "string", "format": "binary", "description": "Examples, as `slm learn` reads them."},
        "adapter": {
            "type": "string",
            "format": "binary",
            "description": "Zip of a PEFT adapter to take over.",
        },
        "kind": {"type": "string", "enum": ["classification", "generation"]},
        "num_epochs": {"type": "integer", "minimum": 1, "maximum": 1000},
        "seed": {"type": "integer", "minimum": 0, "maximum": 2147483647},
        "is_truncating": {"type": "boolean"},
        "labels": {
            "type": "array",
            "items": {"type": "string"},
            "description": "Of an encoder adapter's head.",
        },
    },
}
_UPLOAD = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}


def task_router(desk: Desk) -> APIRouter:
    """``GET /v1/tasks`` and ``GET /v1/tasks/{name}``."""
    router = APIRouter(prefix="/v1", tags=["tasks"])

    @router.get("/tasks", response_model=TaskList)
    async def list_tasks() -> Any:
        """The tasks that requests are answered from now."""
        known = desk.engine.knowledge
        return {"store_version": known.version, "data": [_card(desk, record) for record in known.records]}

    @router.get("/tasks/{name}", response_model=TaskCard)
    async def show_task(name: Name) -> Any:
        """One of them."""
        for record in desk.engine.knowledge.records:
            if record.name == name:
                return _card(desk, record)
        raise unknown_task(name)

    return router


def teaching_router(
    desk: Desk, teacher: Teacher, settings: ServingSettings, refresh: Callable[[], Awaitable[None]]
) -> APIRouter:
    """Teach, forget, and watch jobs."""
    router = APIRouter(prefix="/v1", tags=["teaching"])

    def must_be_allowed() -> None:
        if not settings.is_teaching:
            text = "this server does not teach or forget: run it with --allow-teaching"
            raise Refused(403, text, "teaching_is_off")

    allowed = [Depends(must_be_allowed)]

    @router.post(
        "/tasks", status_code=202, response_model=JobCard, openapi_extra=_UPLOAD, dependencies=allowed
    )
    async def teach(request: Request) -> Response:
        """Teach a task in the background, from a data file or from somebody else's adapter."""
        async with request.form(max_files=2, max_fields=50, max_part_size=1 << 20) as form:
            job = await _take(form, teacher, desk, settings)
        return JSONResponse(job.card(), 202, headers={"Location": f"/v1/jobs/{job.id}"})

    @router.delete("/tasks/{name}", response_model=Forgotten, dependencies=allowed)
    async def forget(name: Name) -> Any:
        """Forget a task; what is being answered from it is finished."""
        try:
            await asyncio.to_thread(desk.engine.model.store.forget, name)
        except TaskError:
            raise unknown_task(name) from None
        await refresh()
        return {"name": name, "store_version": desk.engine.knowledge.version}

    @router.get("/jobs", response_model=JobList)
    async def list_jobs() -> Any:
        """Teaching jobs, newest first."""
        return {"data": [job.card() for job in teacher.all()]}

    @router.get("/jobs/{job_id}", response_model=JobCard)
    async def show_job(job_id: Name) -> Any:
        """One of them."""
        return teacher.job(job_id).card()

    @router.get("/jobs/{job_id}/events", response_class=StreamingResponse)
    async def watch_job(job_id: Name) -> Response:
        """Its card after every change, as server-sent events."""
        events = _events(teacher, teacher.job(job_id))
        return StreamingResponse(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )

    @router.delete("/jobs/{job_id}", response_model=JobCard, dependencies=allowed)
    async def cancel_job(job_id: Name) -> Any:
        """Stop it."""
        job = teacher.job(job_id)
        await teacher.cancel(job)
        return job.card()

    return router


def adapter_router(desk: Desk, settings: ServingSettings) -> APIRouter:
    """Loading adapters by name, as vLLM does: for a server that stands behind a router."""
    router = APIRouter(prefix="/v1", tags=["administration"])

    @router.post("/load_lora_adapter")
    async def load(body: AdapterRequest) -> dict[str, str]:
        """Load an adapter that lies in the adapters folder."""
        if settings.adapters_folder is None:
            raise Refused(403, "this server loads no adapters: run it with --adapters", "adapters_are_off")
        if desk.engine.model.backbone.kind is not BackboneKind.CAUSAL:
            raise Refused(400, "only causal backbones load adapters by name", "invalid_adapter")
        folder = _inside(settings.adapters_folder, body.lora_path or "")
        record, increment = await asyncio.to_thread(_read, desk, body.lora_name, folder)
        before = desk.engine.adapters.get(record.name)
        desk.engine.model.supply.take(record, increment)
        desk.engine.adapters = desk.engine.adapters | {record.name: record}
        if before is not None:
            desk.engine.call(lambda: _drop(desk, before))
        return {"status": "loaded", "lora_name": body.lora_name}

    @router.post("/unload_lora_adapter")
    async def unload(body: AdapterRequest) -> dict[str, str]:
        """Let an adapter go; what is being answered from it is finished."""
        record = desk.engine.adapters.get(body.lora_name)
        if record is None:
            raise Refused(404, f"adapter {body.lora_name!r} is not loaded", "adapter_not_found", "lora_name")
        desk.engine.adapters = {n: r for n, r in desk.engine.adapters.items() if n != body.lora_name}
        desk.engine.call(lambda: _drop(desk, record))
        return {"status": "unloaded", "lora_name": body.lora_name}

    return router


def _inside(folder: Path, path: str) -> Path:
    """A folder below the one that is allowed; links that lead out of it lead nowhere.

    Raises:
        Refused: it is not there.
    """
    try:
        found = (folder / path).resolve()
        is_inside = found.is_relative_to(folder.resolve()) and found.is_dir()
    except (OSError, ValueError):
        is_inside = False
    if not is_inside:
        text = "lora_path must name a folder inside the adapters folder of this server: put it there"
        raise Refused(400, text, "invalid_adapter", "lora_path")
    return found


def _read(desk: Desk, name: str, folder: Path) -> tuple[TaskRecord, Increment]:
    model = desk.engine.model
    shapes = {layer: module.shape for layer, module in model.backbone.reparameterizer.layers.items()}
    increment = read_peft_adapter(folder, shapes, model.backbone.model.base_model_prefix).increment
    commit_id = f"adapter-{uuid.uuid4().hex}"
    record = TaskRecord(
        name,
        0,
        commit_id,
        "generation",
        (),
        utc_now(),
        0,
        1,
        1,
        "",
        (),
        {"needs_two_passes": not set(model.targets).issuperset(increment.pairs)},
    )
    return record, increment


def _drop(desk: Desk, record: TaskRecord) -> None:
    desk.engine.model.supply.loaded.pop(record.commit_id, None)
    desk.engine.model.supply.drop(record)


async def _take(form: FormData, teacher: Teacher, desk: Desk, settings: ServingSettings) -> Job:
    _refuse_unknown_fields(form)
    name, file, adapter = form.get("name"), form.get("file"), form.get("adapter")
    if not isinstance(name, str) or not isinstance(file, UploadFile):
        raise Refused(400, "send a form with the fields name and file", "invalid_form", "name")
    if adapter is not None and not isinstance(adapter, UploadFile):
        raise Refused(400, "adapter must be a file: send a zip of its folder", "invalid_form", "adapter")
    try:
        check_name(name)
    except TaskError as error:
        raise Refused(400, " ".join(str(error).split()), "invalid_value", "name") from None
    if any(record.name == name for record in desk.engine.knowledge.records):
        text = f"task {name!r} is already learned: forget it first or choose another name"
        raise Refused(409, text, "task_exists", "name")
    spec = _settings_of(form)
    folder = teacher.new_folder()
    try:
        limit = settings.max_upload_bytes
        examples = await asyncio.to_thread(save_examples, file.file, file.filename or "", folder, limit)
        await asyncio.to_thread(check_examples, name, examples, spec.get("kind"))
        spec["file"] = str(examples)
        if isinstance(adapter, UploadFile):
            spec["adapter"] = str(await asyncio.to_thread(unpack_adapter, adapter.file, folder, limit))
        return teacher.submit(name, spec, folder)
    except BaseException:
        await asyncio.to_thread(shutil.rmtree, folder, True)
        raise


def _refuse_unknown_fields(form: FormData) -> None:
    known = _FORM["properties"]
    for field in form:
        if field not in known:
            nearest = difflib.get_close_matches(field, known, 1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(known)}"
            raise Refused(400, f"unknown field {field[:100]!r}: {hint}", "invalid_form", field[:100])


def _settings_of(form: FormData) -> dict[str, Any]:
    """The other fields of the form, checked."""
    spec: dict[str, Any] = {}
    for field, most in (("num_epochs", 1000), ("seed", 2**31 - 1)):
        if (value := form.get(field)) not in (None, ""):
            text = str(value)
            least = 1 if field == "num_epochs" else 0
            is_number = len(text) <= 12 and text.isascii() and text.isdigit()
            if not (is_number and least <= int(text) <= most):
                raise Refused(400, f"{field} must be in {least}..{most}", "invalid_value", field)
            spec[field] = int(text)
    if (kind := form.get("kind")) not in (None, ""):
        if kind not in ("classification", "generation"):
            raise Refused(400, "kind must be classification or generation", "invalid_value", "kind")
        spec["kind"] = kind
    if (flag := form.get("is_truncating")) not in (None, ""):
        if str(flag).lower() not in ("true", "false", "1", "0"):
            raise Refused(400, "is_truncating must be true or false", "invalid_value", "is_truncating")
        spec["is_truncating"] = str(flag).lower() in ("true", "1")
    labels = [text for text in form.getlist("labels") if isinstance(text, str)]
    return spec | ({"labels": labels} if labels else {})


async def _events(teacher: Teacher, job: Job) -> AsyncIterator[str]:
    async for card in teacher.watch(job):
        yield f"data: {json.dumps(card)}\n\n"


def _card(desk: Desk, record: TaskRecord) -> Mapping[str, Any]:
    score = record.metadata.get("validation_score")
    is_encoder = desk.engine.model.backbone.kind is BackboneKind.ENCODER
    return {
        "name": record.name,
        "kind": record.kind,
        "labels": list(record.labels),
        "num_examples": record.num_examples,
        "num_keys": record.num_keys,
        "num_increments": record.num_increments,
        "size_bytes": sum(file.size_bytes for file in record.files),
        "created": record.created,
        "validation_score": score,
        "validation_metric": "accuracy" if is_encoder else "token accuracy",
    }
