"""Evaluation: the formulas of continual learning, each once."""

from slm.evaluation.matrix import Evaluation, evaluate_stream

__all__ = ["Evaluation", "evaluate_stream"]
