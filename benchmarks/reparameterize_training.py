"""A training step of ours beside PEFT LoRA's: same frozen model, layers, rank, batch and loss."""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import reparameterize_rivals as rivals
import torch
from peak_memory import peak_mib
from torch import Tensor, nn

from slm.backbone.backbone import Backbone
from slm.config import IncrementConfig, LearningConfig
from slm.learning.learnable import Learnable

NUM_ROWS, NUM_TOKENS, RANK = 8, 64, 8


def _saved_mib(step: Callable[[], object]) -> float:
    """What a step keeps for its backward pass: every tensor once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values()) / 2**20


def _stepper(model: nn.Module, parameters: Sequence[nn.Parameter], ids: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_training(
    backbone: Backbone,
    frozen: nn.Module,
    is_quick: bool,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """Figure 3: time and memory of a step, ours divided by PEFT's in the same round."""
    from peft import get_peft_model

    targets = backbone.targets("all-linear", 0)
    rows, tokens, rounds = (2, 8, 2) if is_quick else (NUM_ROWS, NUM_TOKENS, 7)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 40_000, (rows, tokens), generator=draw).to(backbone.device)
    learnable = Learnable(
        backbone, targets, IncrementConfig(rank=RANK, alpha=2.0 * RANK), LearningConfig(), 0
    )
    learnable.bind()
    learned = rivals.lora_of(targets, RANK, 2.0 * RANK)
    other = get_peft_model(copy.deepcopy(frozen).requires_grad_(False), learned)
    wanted = [parameter for parameter in other.parameters() if parameter.requires_grad]
    assert sum(p.numel() for p in wanted) == sum(p.numel() for p in learnable.parameters())
    # Attention as learning runs it, for both.
    other.get_base_model().config._attn_implementation = "eager" if backbone.device.type == "cpu" else "sdpa"
    found: dict[str, Any] = {}
    try:
        with backbone.learning_attention():
            steps = {
                "ours": _stepper(backbone.model, list(learnable.parameters()), ids),
                "PEFT LoRA": _stepper(other, wanted, ids),
            }
            times = _take_turns(steps, rounds, backbone.device, clock)
            for name, step in steps.items():
                gc.collect()
                peaks = [peak_mib(step, backbone.device) for _ in range(3)]
                found[name] = {
                    "seconds": statistics.median(times[name]),
                    "saved_mib": _saved_mib(step),
                    "peak_mib": statistics.median(peaks),
                }
    finally:
        backbone.reparameterizer.release()
    ratios = sorted(a / b for a, b in zip(times["ours"], times["PEFT LoRA"], strict=True))
    found["ratio"], found["range"] = statistics.median(ratios), [ratios[0], ratios[-1]]
    found["table"] = _render(found, rows, tokens)
    return found


def _take_turns(
    steps: dict[str, Callable[[], None]], rounds: int, device: torch.device, clock: Callable[[], float]
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name in sorted(steps, reverse=bool(number % 2)):
            begun = clock()
            steps[name]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:
                times[name].append(clock() - begun)
    return times


def _render(found: dict[str, Any], rows: int, tokens: int) -> str:
    low, high = found["range"]
    lines = [
        "### A training step",
        "",
        f"{rows} rows of {tokens} tokens, rank {RANK}, all linear layers, float32 increments, AdamW. "
        f"Ours takes {found['ratio']:.3f} ({low:.2f}-{high:.2f}) of PEFT's time.",
        "",
        "| | ms | kept for the backward pass, MiB | memory above the model, MiB |",
        "|---|---:|---:|---:|",
    ]
    for name in ("ours", "PEFT LoRA"):
        row = found[name]
        lines.append(
            f"| {name} | {1e3 * row['seconds']:.0f} | {row['saved_mib']:.0f} | {row['peak_mib']:.0f} |"
        )
    return "\n".join(lines) + "\n"
