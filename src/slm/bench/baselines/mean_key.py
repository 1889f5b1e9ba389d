"""One increment per task and its mean query as key: the nearest by cosine has all the weight, none abstains.

The increments are slm's own and so are the queries; only the decision differs.
"""

from __future__ import annotations

import dataclasses

import torch

from slm.bench.baselines.isolated import IsolatedRival
from slm.config import Config, CosineConfig, RetrievalConfig
from slm.retrieval.cosine import unit_groups
from slm.retrieval.keys import TaskKeys
from slm.store import TaskKnowledge


class MeanKey(IsolatedRival):
    """Plain cosine to one mean per task."""

    name = "mean-key"
    title = "LoRA per task, mean key"

    def retrieval(self, config: RetrievalConfig) -> RetrievalConfig:
        """The nearest key alone, compared by plain cosine."""
        cosine = CosineConfig(num_groups=1, keys_per_task=1)
        return dataclasses.replace(
            config,
            form="cosine",
            cosine=cosine,
            keys_per_task=1,
            prior="uniform",
            top_k=1,
            is_abstaining=False,
        )

    @property
    def learning_config(self) -> Config:
        """Slm's, so that both have the same increments."""
        return self.setup.config

    def convert(self, knowledge: TaskKnowledge) -> TaskKnowledge:
        """The mean of the task's queries as its only key."""
        keys = knowledge.keys
        shares = keys.counts.double() / keys.counts.sum()
        mean = TaskKeys(
            means=unit_groups((shares[:, None] * keys.means).sum(0, keepdim=True), 1),
            counts=keys.counts.sum()[None],
            scatter=torch.zeros(0),
        )
        return dataclasses.replace(knowledge, keys=mean)
