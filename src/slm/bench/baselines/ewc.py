"""EWC, elastic weight consolidation (Kirkpatrick et al. 2017): important weights are held where they were.

After task i the diagonal Fisher information F_i of the loss it learned with (its own labels the only possible
ones, where ``masks_labels``) is taken at the learned parameters θ_i. Later
tasks are learned with the penalty

    strength / 2 · Σ_i Σ_p F_ip (θ_p − θ_ip)²

on the shared increment and head. A sum of parabolas is a parabola: with P = Σ_i F_i and the centre m = Σ_i
F_i θ_i / P it is strength / 2 · Σ_p P_p (θ_p − m_p)² plus a constant, so two numbers a parameter are kept
however many tasks there were.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slm.bench.baselines.rows import size_of
from slm.bench.baselines.shared_increment import SharedIncrement, SharedRival
from slm.bench.rival import Setup
from slm.learning.trainer import TrainingRow, weights_of
from slm.tasks import Task

MAX_FISHER_ROWS = 200
"""Rows the Fisher information of a task is estimated from; each takes a backward pass of its own."""


class ElasticWeightConsolidation(SharedRival):
    """The shared increment under a quadratic penalty."""

    name = "ewc"
    title = "EWC"
    defaults = {**SharedRival.defaults, "masks_labels": 1.0, "strength": 10000.0}

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.precision: dict[str, Tensor] = {}  # Σ_i F_i
        self.pull: dict[str, Tensor] = {}  # Σ_i F_i θ_i
        self.centre: dict[str, Tensor] = {}

    def before(self, task: Task) -> None:
        """Labels not seen before carry no penalty yet."""
        if not self.precision:
            return
        for name, parameter in self.knowledge.named_parameters():
            for kept in (self.precision, self.pull):
                kept[name] = _grown(kept[name], parameter)
            self.centre[name] = self.pull[name] / self.precision[name].clamp_min(1e-30)
        self.knowledge.penalty = self.penalty

    def penalty(self) -> Tensor:
        """The penalty strength / 2 · Σ_p P_p (θ_p − m_p)², ()."""
        terms = [
            (self.precision[name] * (parameter - self.centre[name]) ** 2).sum()
            for name, parameter in self.knowledge.named_parameters()
        ]
        return self.settings["strength"] / 2 * torch.stack(terms).sum()

    def after(self, task: Task, rows: Sequence[TrainingRow]) -> None:
        """Add the Fisher information of this task."""
        step = max(1, len(rows) // MAX_FISHER_ROWS)
        found = fisher(self.knowledge, rows[::step][:MAX_FISHER_ROWS])
        for name, parameter in self.knowledge.named_parameters():
            information, value = found[name], parameter.detach()
            zero = torch.zeros_like(value)
            self.precision[name] = self.precision.get(name, zero) + information
            self.pull[name] = self.pull.get(name, zero) + information * value

    @property
    def size_bytes(self) -> int:
        """Bytes of increment and head, and two numbers more for each of theirs."""
        return super().size_bytes + size_of(self.precision) + size_of(self.pull)


def fisher(knowledge: SharedIncrement, rows: Sequence[TrainingRow]) -> dict[str, Tensor]:
    """Mean over the rows of the squared gradient of log p(answer | question), for every parameter."""
    backbone, parameters = knowledge.backbone, dict(knowledge.named_parameters())
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    knowledge.eval()
    knowledge.bind()
    try:
        with backbone.learning_attention():
            for row in rows:
                labels = torch.tensor([row.label], device=backbone.device)
                outcome = knowledge.outcome(backbone.batch([row.row]), labels, weights_of([row]))
                log_likelihood = outcome.loss * outcome.num_counted.to(backbone.device)
                gradients = torch.autograd.grad(log_likelihood, list(parameters.values()))
                for name, gradient in zip(parameters, gradients, strict=True):
                    total[name] += gradient**2
    finally:
        backbone.reparameterizer.release()
    return {name: value / len(rows) for name, value in total.items()}


def _grown(kept: Tensor, parameter: Tensor) -> Tensor:
    """With zeros for labels that came later."""
    missing = len(parameter) - len(kept)
    return torch.cat([kept, kept.new_zeros(missing, *kept.shape[1:])]) if missing else kept
