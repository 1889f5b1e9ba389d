"""Tasks: what is learned. A task is a name, a kind, examples and labels; a stream is ordered tasks."""

from slm.tasks.load import load_task, read_questions
from slm.tasks.packaged import PACKAGED_TASKS
from slm.tasks.stream import Stream
from slm.tasks.task import Example, Message, Task, TaskKind

__all__ = [
    "PACKAGED_TASKS",
    "Example",
    "Message",
    "Stream",
    "Task",
    "TaskKind",
    "load_task",
    "read_questions",
]
