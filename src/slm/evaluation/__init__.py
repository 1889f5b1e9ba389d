"""Evaluation: the formulas of continual learning, each once."""
