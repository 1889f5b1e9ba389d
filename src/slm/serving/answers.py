"""Wire types of what leaves: answers in OpenAI's shapes, and those of slm's own routes."""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal

from pydantic import BaseModel


class TaskWeight(BaseModel):
    """One task of a mixture."""

    task: str
    weight: float


class Knowing(BaseModel):
    """Which knowledge an answer comes from: the field ``slm`` of every answer."""

    mixture: list[TaskWeight]
    is_abstained: bool
    store_version: int
    confidence: float | None = None
    kind: str | None = None


class Usage(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(BaseModel):
    """One likely token."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """One written token."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of a chat answer."""

    content: list[TokenLogprob]


class ChatMessage(BaseModel):
    """The answer of a chat."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer of a chat."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """Answer of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    slm: Knowing


class TextLogprobs(BaseModel):
    """Log-probabilities of a text completion."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    """One text completion."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: Literal["stop", "length"]
    slm: Knowing


class TextCompletion(BaseModel):
    """Answer of ``/v1/completions``; with several prompts each choice says its own knowledge."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    slm: Knowing


class LabelChance(BaseModel):
    """One label."""

    label: str
    probability: float


class Classification(BaseModel):
    """Labels of one text, likeliest first; none when it belongs to no task with labels."""

    index: int
    label: str | None
    probabilities: list[LabelChance]
    slm: Knowing


class Classifications(BaseModel):
    """Answer of ``/v1/classifications``."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Classification]
    usage: Usage


class Candidate(BaseModel):
    """One key near a text."""

    task: str
    weight: float
    probability: float
    distance: float
    threshold: float | None
    key: int


class Retrieval(BaseModel):
    """What DTKR decides for one text."""

    index: int
    is_abstained: bool
    is_contested: bool
    candidates: list[Candidate]


class Retrievals(BaseModel):
    """Answer of ``/v1/retrievals``."""

    object: Literal["list"] = "list"
    store_version: int
    data: list[Retrieval]


class ModelCard(BaseModel):
    """One model that can be asked for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "slm"


class ModelList(BaseModel):
    """Answer of ``/v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Limits(BaseModel):
    """Answer of ``/v1/limits``: what a client may do here.

    Attributes:
        max_tokens: longest answer that may be asked for; None where another server answers.
        is_teaching: whether tasks may be taught and forgotten.
    """

    max_tokens: int | None
    is_teaching: bool


class TaskCard(BaseModel):
    """One learned task."""

    name: str
    kind: str
    labels: list[str]
    num_examples: int
    num_keys: int
    num_increments: int
    size_bytes: int
    created: str
    validation_score: float | None
    validation_metric: str


class TaskList(BaseModel):
    """Answer of ``GET /v1/tasks``."""

    object: Literal["list"] = "list"
    store_version: int
    data: list[TaskCard]


class Forgotten(BaseModel):
    """Answer of ``DELETE /v1/tasks/{name}``."""

    name: str
    is_deleted: Literal[True] = True
    store_version: int


class JobCard(BaseModel):
    """A task being learned in the background."""

    id: str
    object: Literal["job"] = "job"
    task: str
    state: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    progress: float
    step: int
    num_steps: int | None
    error: str | None
    created: float
    finished: float | None
    report: dict[str, Any] | None = None


class JobList(BaseModel):
    """Answer of ``GET /v1/jobs``."""

    object: Literal["list"] = "list"
    data: list[JobCard]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """The body of every answer that is none."""

    error: ErrorDetail


def new_id(prefix: str) -> str:
    """An id of an answer."""
    return f"{prefix}-{uuid.uuid4().hex}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())
