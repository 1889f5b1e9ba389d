"""Wire types of the OpenAI-shaped routes; what a body must look like is said here and nowhere else."""

from __future__ import annotations

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

from slm.checked import half_character
from slm.serving.work import AUTO, Wish

MAX_STOPS = 4
MAX_CHOICES = 16
MAX_LOGPROBS = 20
MAX_SEED = (1 << 63) - 1


def _check_unicode(text: str) -> str:
    """Refuse halves of surrogate pairs, which JSON can say and no tokenizer can read."""
    if half_character(text) is not None:
        raise ValueError("must be whole Unicode characters")
    return text


Words = Annotated[str, AfterValidator(_check_unicode)]
Text = Annotated[Words, StringConstraints(min_length=1)]
Stops = Words | Annotated[list[Text], Field(max_length=MAX_STOPS)] | None
Model = Annotated[Words, Field(min_length=1, max_length=300)]


class Wire(BaseModel):
    """Base of everything that arrives: unknown fields are let pass, NaN and infinity are not.

    Null says the default, where there is one.
    """

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: value for name, value in data.items() if value is not None or name not in optional}


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

    lora_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+=:/-]{0,299}$")]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
