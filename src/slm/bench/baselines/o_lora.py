"""O-LoRA (Wang et al. 2023): each task learns an increment in a subspace orthogonal to the earlier ones.

Task t trains the pairs (A_t, B_t) of every layer with the earlier ones frozen beneath them, under the penalty

    strength · Σ_layers Σ_{i<t} ‖A_i A_tᵀ‖²

on how far the rows of A overlap. At test all increments are summed, so no task-ID is needed. The paper's
second penalty, on the size of the pairs, is left to weight decay. The paper's T5 writes its labels; an
encoder's head is shared here as by every rival without task-ID.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slm.backbone.reparameterize import LearningBinding
from slm.bench.baselines.rows import size_of
from slm.bench.baselines.shared_increment import SharedIncrement, SharedRival
from slm.tasks import Task


@dataclass(frozen=True, slots=True)
class Summed:
    """The change of one layer: the increment being learned on top of the earlier ones.

    Attributes:
        new: being learned.
        A: (tR, I), the earlier A's stacked.
        B: (O, tR), the earlier B's side by side.
    """

    new: LearningBinding
    A: Tensor
    B: Tensor

    def bend(self, layer: torch.nn.Module, x: Tensor) -> Tensor:
        """The layer's output for the input x plus the change of all increments."""
        half = torch.nn.functional.linear(x, self.A.to(x.dtype))
        return self.new.add(
            layer(x) + self.new.scale * torch.nn.functional.linear(half, self.B.to(x.dtype)), x
        )


class OrthogonalIncrements(SharedIncrement):
    """Increments of all tasks, summed; only the newest learns."""

    num_earlier = 0

    def bind(self) -> None:
        """Bend the backbone with the sum of all increments."""
        if not self.num_earlier:
            return super().bind()
        changes = {name: Summed(self.newest(name), *self.earlier[name]) for name in self.names}
        self.backbone.reparameterizer.bind_each(changes)

    def newest(self, name: str) -> LearningBinding:
        """The increment of a layer that learns."""
        binding = self.bindings[self.names.index(name)]
        assert isinstance(binding, LearningBinding)
        return binding

    def add_one(self, seed: int) -> None:
        """Freeze the newest increment and put a fresh one, which changes nothing yet, on top."""
        seeds = torch.Generator().manual_seed(seed)
        before = self.earlier if self.num_earlier else {}
        self.earlier: dict[str, tuple[Tensor, Tensor]] = {}
        for name in self.names:
            binding = self.newest(name)
            A, B = binding.A.detach().clone(), binding.B.detach().clone()
            if name in before:
                A, B = torch.cat([before[name][0], A]), torch.cat([before[name][1], B], dim=1)
            self.earlier[name] = (A, B)
            fresh = (torch.rand(binding.A.shape, generator=seeds) * 2 - 1) * binding.A.shape[1] ** -0.5
            with torch.no_grad():
                binding.A.copy_(fresh)
                binding.B.zero_()
        self.num_earlier += 1

    def overlap(self) -> Tensor:
        """Σ_layers Σ_{i<t} ‖A_i A_tᵀ‖², ()."""
        terms = [(self.earlier[name][0] @ self.newest(name).A.T).square().sum() for name in self.names]
        return torch.stack(terms).sum()


class OrthogonalLora(SharedRival):
    """One more increment for every task, kept away from the earlier ones' subspaces."""

    name = "o-lora"
    title = "O-LoRA"
    defaults = {**SharedRival.defaults, "masks_labels": 1.0, "strength": 0.5}
    knowledge: OrthogonalIncrements

    def begin(self) -> OrthogonalIncrements:
        """The increment of the first task."""
        self.num_tasks = 0
        return OrthogonalIncrements(self.setup.backbone, self.setup.config.increments, self.config)

    def before(self, task: Task) -> None:
        """A new increment, and the penalty that keeps it apart."""
        if self.num_tasks:
            self.knowledge.add_one(seed=1000 * self.num_tasks + self.setup.seed)
            self.knowledge.penalty = lambda: self.settings["strength"] * self.knowledge.overlap()
        self.num_tasks += 1

    @property
    def size_bytes(self) -> int:
        """Bytes of all increments and the head."""
        if not self.knowledge.num_earlier:
            return super().size_bytes
        return super().size_bytes + sum(size_of(pair) for pair in self.knowledge.earlier.values())
