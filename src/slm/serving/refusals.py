"""What a client is told when it gets no answer: one table from error class to HTTP status and OpenAI body."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slm.errors import (
    BackboneError,
    ConfigError,
    DataError,
    IncrementError,
    LearningError,
    SlmError,
    StoreError,
    TaskError,
)


class Refused(Exception):  # noqa: N818 - an answer, not a defect
    """A request that gets no answer.

    Args:
        status: of HTTP.
        message: one line for a person.
        code: one word for a program.
        param: the field of the request that is at fault.
        headers: to be sent with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The body, as OpenAI's clients read it."""
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, "server_error" if self.status >= 500 else _INVALID),
                "param": self.param,
                "code": self.code,
            }
        }


_INVALID = "invalid_request_error"
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    408: "timeout_error",
    429: "rate_limit_error",
    504: "timeout_error",
}

_TABLE: tuple[tuple[type[Exception], int, str], ...] = (
    (ConfigError, 400, "invalid_value"),
    (DataError, 400, "invalid_value"),
    (TaskError, 404, "task_not_found"),
    (IncrementError, 400, "invalid_adapter"),
    (LearningError, 500, "learning_failed"),
    (StoreError, 503, "store_unavailable"),
    (BackboneError, 503, "backbone_unavailable"),
    (SlmError, 500, "server_error"),
)
"""The first class that fits decides. What is not here is a defect: 500, and its text stays in the log."""

_HIDDEN = "the request failed inside the server: try again, and give its X-Request-Id to whoever runs it"


def refuse(error: BaseException) -> Refused:
    """What a client is told of an error; neither a traceback nor a path ever leaves."""
    if isinstance(error, Refused):
        return error
    for kind, status, code in _TABLE:
        if isinstance(error, kind):
            # A store's messages name folders of the server.
            message = " ".join(str(error).split()) if status < 500 else _HIDDEN
            return Refused(status, message, code)
    return Refused(500, _HIDDEN, "server_error")


def invalid_body(mistakes: Sequence[Mapping[str, Any]]) -> Refused:
    """What a client is told of a body that is not as it must be.

    Args:
        mistakes: as pydantic lists them: where a field may be a text or a list, one for each of the two.
    """
    first = mistakes[0]
    if first["type"] == "json_invalid":
        return Refused(400, "the body is no valid JSON", "invalid_json")
    if first["loc"] == ("body",) and first["type"] in ("missing", "model_attributes_type", "dict_type"):
        text = "the body must be a JSON object, sent as Content-Type: application/json"
        return Refused(400, text, "invalid_body")
    what = str(first["msg"]).removeprefix("Value error, ")
    if _is_of_other_type(first):
        field = first["loc"][:-1]
        others = [m for m in mistakes if m["loc"][: len(field)] == field and not _is_of_other_type(m)]
        first = others[0] if others else first
        what = str(first["msg"]) if others else "must be a text or a list"
    path = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    place = ".".join(part for part in path if not _is_branch(part))[:200]
    return Refused(400, f"{place}: {what}" if place else what, "invalid_value", place or None)


def _is_of_other_type(mistake: Mapping[str, Any]) -> bool:
    """Whether a field that may be of several types is merely not of this one."""
    return _is_branch(mistake["loc"][-1]) and mistake["type"] in ("string_type", "list_type")


def _is_branch(part: object) -> bool:
    """Whether a part of a place names a type, ``list[str]`` say, in place of a field."""
    return isinstance(part, str) and part.endswith("]")


def unknown_model(name: str) -> Refused:
    """There is no such model."""
    return Refused(
        404,
        f"model {name[:200]!r} does not exist: ask for 'auto', or list /v1/models to see the others",
        "model_not_found",
        "model",
    )


def unknown_task(name: str, message: str | None = None) -> Refused:
    """There is no such task."""
    told = message or f"task {name[:200]!r} does not exist: list /v1/tasks to see the others"
    return Refused(404, told, "task_not_found", "name")


def too_busy(retry_after_s: int, queue_size: int) -> Refused:
    """The queue is full."""
    return Refused(
        429,
        f"{queue_size} requests are waiting already: try again in {retry_after_s} s",
        "queue_full",
        headers={"Retry-After": str(retry_after_s)},
    )


def too_late(deadline_s: float) -> Refused:
    """The deadline has passed."""
    return Refused(
        504, f"no answer within {deadline_s:g} s: ask for fewer tokens or try again", "deadline_exceeded"
    )


def shutting_down() -> Refused:
    """The server is about to stop."""
    return Refused(503, "the server is stopping: try again", "shutting_down", headers={"Retry-After": "1"})
