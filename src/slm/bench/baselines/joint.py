"""Joint training: one increment trained on the union of all tasks, the bound of what sharing can give.

At slm's rank, and at the summed rank of all tasks' increments, which is as many numbers as slm keeps.
"""

from __future__ import annotations

import dataclasses

from slm.bench.baselines.shared_increment import SharedIncrement, SharedRival
from slm.tasks import Stream, Task


class Joint(SharedRival):
    """All tasks together, at the rank of one."""

    name = "joint"
    title = "joint training"
    is_joint = True
    defaults = {**SharedRival.defaults, "learning_rate": 2e-3}

    def factor(self, num_tasks: int) -> int:
        """How many times the rank of one task the increment has."""
        return 1

    def learn(self, task: Task) -> None:
        """One task, as a union of one."""
        self.learn_all(Stream((task,)))

    def learn_all(self, stream: Stream) -> None:
        """Train a new increment on the union of all tasks."""
        shape, factor = self.setup.config.increments, self.factor(len(stream))
        # The scale alpha / rank stays that of one task's increment.
        wide = dataclasses.replace(shape, rank=factor * shape.rank, alpha=factor * shape.alpha)
        self.knowledge = SharedIncrement(self.setup.backbone, wide, self.config)
        self.learn_together(list(stream))


class JointWide(Joint):
    """All tasks together, at the summed rank of all of them."""

    name = "joint-wide"
    title = "joint training, summed rank"
    defaults = SharedRival.defaults  # its own learning rate was never tuned

    def factor(self, num_tasks: int) -> int:
        """As many as there are tasks."""
        return num_tasks
