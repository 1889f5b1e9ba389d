"""Sequential LoRA: one increment trained on every task in turn, nothing done against forgetting."""

from __future__ import annotations

from slm.bench.baselines.shared_increment import SharedRival


class SequentialLora(SharedRival):
    """The shared increment as it is."""

    name = "sequential-lora"
    title = "sequential LoRA"
