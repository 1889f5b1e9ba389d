"""Learning: prepare, fine-tune, commit; or take what was fine-tuned elsewhere."""

from slm.learning.adopt import ImportReport, import_adapter
from slm.learning.learner import LearningReport, learn_task, show_examples

__all__ = [
    "ImportReport",
    "LearningReport",
    "import_adapter",
    "learn_task",
    "show_examples",
]
