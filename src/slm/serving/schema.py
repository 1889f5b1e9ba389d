"""Wire types of the OpenAI-shaped routes; what a body must look like is said here and nowhere else."""

from __future__ import annotations

import time
import uuid
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from slm.serving.work import AUTO, Wish

MAX_STOPS = 4
MAX_CHOICES = 16
MAX_LOGPROBS = 20
MAX_SEED = (1 << 63) - 1


def _check_unicode(text: str) -> str:
    """Refuse halves of surrogate pairs, which JSON can say and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be whole Unicode characters") from None
    return text


Words = Annotated[str, AfterValidator(_check_unicode)]
Text = Annotated[Words, StringConstraints(min_length=1)]
Stops = Words | Annotated[list[Text], Field(max_length=MAX_STOPS)] | None
Model = Annotated[Words, Field(min_length=1, max_length=300)]


class Wire(BaseModel):
    """Base of everything that arrives: unknown fields are let pass, NaN and infinity are not."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())


class TextPart(Wire):
    """A part of a message; only text can be read."""

    type: Literal["text"]
    text: Words


class Message(Wire):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Words | Annotated[list[TextPart], Field(min_length=1)]

    @property
    def words(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)


class StreamOptions(Wire):
    """How an answer is streamed."""

    include_usage: bool = False


class _Writing(Wire):
    """What chat and text completions have in common."""

    model: Model = AUTO
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Stops = None
    seed: Annotated[int, Field(ge=-MAX_SEED, le=MAX_SEED)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, float] | None = None

    @field_validator("stop")
    @classmethod
    def _stop_is_no_empty_text(cls, value: Stops) -> Stops:
        if value == "":
            raise ValueError("must not be empty")
        return value

    @model_validator(mode="after")
    def _refuse_what_is_not_done(self) -> Any:
        for name in ("presence_penalty", "frequency_penalty", "logit_bias", *self._not_done()):
            if getattr(self, name):
                raise ValueError(f"{name} is not supported: leave it out")
        return self

    def _not_done(self) -> tuple[str, ...]:
        return ()

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def wish_for(self, is_streaming: bool) -> Wish:
        """How the answers are to be written, and told."""
        return replace(self.wish, is_streaming=is_streaming)

    @property
    def wish(self) -> Wish:
        """How the answers are to be written."""
        raise NotImplementedError

    def _wish(self, max_tokens: int | None, num_logprobs: int | None) -> Wish:
        return Wish(
            max_tokens=max_tokens,
            temperature=self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            num_answers=self.n or 1,
            stops=self.stops,
            num_logprobs=num_logprobs,
        )


class ChatRequest(_Writing):
    """Body of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None

    def _not_done(self) -> tuple[str, ...]:
        is_text = (self.response_format or {}).get("type", "text") == "text"
        return ("tools", "functions") if is_text else ("tools", "functions", "response_format")

    @property
    def prompt(self) -> Any:
        """As the library takes it; a lone question is a text, whose rendering is the same."""
        roles = {"developer": "system"}
        messages = [{"role": roles.get(m.role, m.role), "content": m.words} for m in self.messages]
        return messages[0]["content"] if [m["role"] for m in messages] == ["user"] else messages

    @property
    def wish(self) -> Wish:
        """How the answer is to be written."""
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self._wish(limit, (self.top_logprobs or 0) if self.logprobs else None)


class CompletionRequest(_Writing):
    """Body of ``/v1/completions``."""

    prompt: Words | Annotated[list[Words], Field(min_length=1, max_length=1000)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

    def _not_done(self) -> tuple[str, ...]:
        return ("echo", "suffix") if self.best_of in (None, self.n or 1) else ("echo", "suffix", "best_of")

    @property
    def prompts(self) -> list[str]:
        """The prompts, one or several."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def wish(self) -> Wish:
        """How the answers are to be written."""
        return self._wish(self.max_tokens, self.logprobs)


class InputRequest(Wire):
    """Body of ``/v1/classifications`` and ``/v1/retrievals``."""

    model: Model = AUTO
    input: Words | Annotated[list[Words], Field(min_length=1, max_length=1000)]

    @property
    def texts(self) -> list[str]:
        """The texts, one or several."""
        return [self.input] if isinstance(self.input, str) else self.input


class AdapterRequest(Wire):
    """Body of ``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``."""

    lora_name: Annotated[str, Field(min_length=1, max_length=200)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)] | None = None


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
    bytes: list[int]


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
