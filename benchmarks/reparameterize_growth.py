"""Whether a row's time and the pool's memory grow with what is stored."""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import increment_pool
import torch

from slm.backbone.backbone import Backbone
from slm.backbone.load import load_backbone
from slm.backbone.reparameterize import Mixture
from slm.increments.pool import IncrementPool
from slm.store.folders import TaskFolders

NUM_ROWS, NUM_TOKENS, RANK = 32, 64, 8


class _Stored:
    """A folder of increments and the pool before it; a batch uses 32 of them, or all."""

    def __init__(self, root: Path, backbone: Backbone, num_stored: int) -> None:
        root.mkdir()
        layers = backbone.reparameterizer.layers
        shapes = {
            name: (layers[name].shape[1], layers[name].shape[0]) for name in backbone.targets("all-linear", 0)
        }
        records = increment_pool.write_tasks(root, num_stored, shapes, RANK)
        folders, self.pool = TaskFolders(root), IncrementPool(1 << 30)
        chosen = random.Random(0).sample(range(num_stored), min(num_stored, NUM_ROWS))
        self.wanted = {number: partial(folders.increment, records[number], 0) for number in chosen}
        self.slots = torch.arange(NUM_ROWS)[:, None] % len(chosen)

    @torch.inference_mode()
    def seconds_per_row(self, backbone: Backbone, ids: torch.Tensor, clock: Callable[[], float]) -> float:
        """Pool, binding and one forward pass."""
        begun = clock()
        mixture = Mixture(self.pool.get(self.wanted), self.slots, torch.ones(NUM_ROWS, 1))
        backbone.reparameterizer.bind(mixture)
        hidden = backbone.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        float(hidden[0, 0, 0])
        backbone.reparameterizer.release()
        return (clock() - begun) / NUM_ROWS


def measure_growth(is_quick: bool, clock: Callable[[], float]) -> dict[str, Any]:
    """Figure 4: MiniLM, a row's time with ever more stored."""
    backbone = load_backbone("minilm")
    counts, rounds = ((4, 8), 2) if is_quick else ((4, 32, 100, 1000), 15)
    ids = torch.randint(10, 20_000, (NUM_ROWS, NUM_TOKENS)).to(backbone.device)
    times: dict[int, list[float]] = {count: [] for count in counts}
    with tempfile.TemporaryDirectory() as folder:
        stores = {n: _Stored(Path(folder) / str(n), backbone, n) for n in counts}
        for number in range(rounds + 1):
            for count in random.Random(number).sample(counts, len(counts)):
                backbone.reparameterizer.bank.clear()
                stores[count].seconds_per_row(backbone, ids, clock)  # bound for the first time
                seconds = [stores[count].seconds_per_row(backbone, ids, clock) for _ in range(3)]
                if number:
                    times[count].append(statistics.median(seconds))
    lines = [
        "### Time of a row as the store grows",
        "",
        f"MiniLM, {NUM_ROWS} rows of {NUM_TOKENS} tokens, each with its own increment (or all in turn).",
        "",
        "| stored | in use | ms a row | × of 32 stored |",
        "|---:|---:|---:|---:|",
    ]
    rows = []
    base = times.get(32) or times[counts[0]]
    for count in counts:
        ratio = statistics.median(a / b for a, b in zip(times[count], base, strict=True))
        rows.append({"stored": count, "ms": 1e3 * statistics.median(times[count]), "ratio": ratio})
        lines.append(f"| {count:,} | {min(count, NUM_ROWS)} | {rows[-1]['ms']:.3f} | {ratio:.3f} |")
    return {"rows": rows, "table": "\n".join(lines) + "\n"}


def measure_pool(is_quick: bool) -> dict[str, Any]:
    """Figure 4: the pool's memory with 10,000 stored."""
    found = increment_pool.measure(100 if is_quick else 10_000, 200 if is_quick else 2_000, budget_mib=64)
    table = "### The pool\n\n" + increment_pool.render(found) + "\n"
    return {**found, "table": table}
