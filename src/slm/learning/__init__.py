"""Learning: prepare, fine-tune, commit."""

from slm.learning.learner import LearningReport, learn_task, show_examples

__all__ = ["LearningReport", "learn_task", "show_examples"]
