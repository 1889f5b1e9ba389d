"""What re-parameterizing costs: against the frozen model, PEFT, and full weight changes.

    python benchmarks/reparameterize.py

SmolLM2, in the dtype the library chooses on this machine, on a GPU where there is one. Contenders take turns
in a new order each round; a ratio is the median over rounds of time divided by the frozen model's.
Writes ``<out>/<name>.json`` and ``<out>/<name>.md``; ``--quick`` is a smoke test. Where other programs keep
the processor busy, ``OMP_NUM_THREADS=1`` with ``--processor-time`` still gives fair ratios.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).parent))
import reparameterize_rivals as rivals
from peak_memory import peak_mib
from reparameterize_growth import measure_growth, measure_pool
from reparameterize_page import describe_machine, render, render_turns
from reparameterize_training import measure_training

from slm.backbone.backbone import Backbone
from slm.backbone.load import load_backbone
from slm.backbone.merge import merge, unmerge
from slm.backbone.reparameterize import Mixture
from slm.increments.increment import Increment, LowRankPair


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    rows: int = 32
    tokens: int = 128
    steps: int = 3
    rounds: int = 7
    decode_rounds: int = 25
    stored: int = 64
    routed_rows: int = 8
    routed_tokens: int = 32
    rank: int = 8


QUICK = Sizes(rows=4, tokens=8, steps=2, rounds=2, decode_rounds=2, stored=8, routed_rows=2, routed_tokens=8)


WARM_UP = 3
"""Rounds of prompts that do not count: so long the process goes on asking the system for memory."""


@dataclass(frozen=True)
class Contender:
    """A model, what is done before it is asked, and what every forward pass is given beside the tokens."""

    model: nn.Module
    prepare: Callable[[], object] = lambda: None
    finish: Callable[[], object] = lambda: None
    extra: Mapping[str, Any] | None = None


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, so that no contender pays for new pages because of what the others left.

    Left alone, it hands the activations of some rounds back to the system and those of others not.
    """
    if platform.libc_ver()[0] == "glibc":
        for parameter, size in ((-3, 1 << 30), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, size)


def random_increments(backbone: Backbone, targets: Sequence[str], num: int, rank: int) -> list[Increment]:
    """Increments of the size and dtype that learning gives them."""
    draw = torch.Generator().manual_seed(0)
    shapes = {name: backbone.reparameterizer.layers[name].shape for name in targets}
    return [
        Increment(
            {
                name: LowRankPair(
                    torch.randn(rank, num_in, generator=draw) * num_in**-0.5,
                    0.02 * torch.randn(num_out, rank, generator=draw),
                )
                for name, (num_out, num_in) in shapes.items()
            },
            rank,
            2.0 * rank,
        ).in_float16()
        for _ in range(num)
    ]


def draw_mixture(increments: Sequence[Increment], num_rows: int) -> tuple[Tensor, Tensor]:
    """Slots and weights of rows that each mix two increments of their own choice."""
    draw = torch.Generator().manual_seed(1)
    slots = torch.stack([torch.randperm(len(increments), generator=draw)[:2] for _ in range(num_rows)])
    first = 0.5 + 0.5 * torch.rand(num_rows, 1, generator=draw)
    return slots, torch.cat([first, 1 - first], dim=1)


def mixture_of(increments: Sequence[Increment], slots: Tensor, weights: Tensor) -> Mixture:
    """A mixture of only those increments that are in use."""
    used, inverse = slots.unique(return_inverse=True)
    return Mixture([increments[int(slot)] for slot in used], inverse, weights)


CLOCK: list[Callable[[], float]] = [time.perf_counter]
"""What tells the time."""


class Clock:
    """Seconds since it was last read, with a GPU's work done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = CLOCK[0]()

    def lap(self) -> float:
        """Seconds since the last reading, or since it was made."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        before, self._last = self._last, CLOCK[0]()
        return self._last - before


def prefill(contender: Contender, ids: Tensor, cache: DynamicCache | None) -> dict[str, float]:
    """Seconds of binding, of the pass over the prompts, and of both; what was bound stays bound."""
    clock = Clock(ids.device)
    contender.prepare()
    bind = clock.lap()
    forward(contender, ids, torch.ones_like(ids), cache)
    seconds = clock.lap()
    return {"bind": bind, "prefill": seconds, "request": bind + seconds}


def decode(contender: Contender, ids: Tensor, cache: DynamicCache | None, num_steps: int) -> float:
    """Seconds of one decoding step, the median of several; the cache holds the prompts again afterwards."""
    clock, steps = Clock(ids.device), []
    for _ in range(num_steps):
        ids = torch.cat([ids, ids[:, -1:]], dim=1)
        clock.lap()
        forward(contender, ids if cache is None else ids[:, -1:], torch.ones_like(ids), cache)
        steps.append(clock.lap())
    if cache is not None:
        cache.crop(-num_steps)
    return statistics.median(steps)


def forward(contender: Contender, ids: Tensor, mask: Tensor, cache: DynamicCache | None) -> None:
    """One pass that asks for the last token alone, as slm's own prefill does."""
    options: dict[str, Any] = {"logits_to_keep": torch.tensor([-1], device=ids.device)}
    options |= {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
    contender.model(input_ids=ids, attention_mask=mask, **options, **(contender.extra or {}))


@torch.inference_mode()
def take_turns(contenders: Mapping[str, Contender], ids: Tensor, sizes: Sizes) -> dict[str, dict[str, Any]]:
    """Per contender and phase: median seconds, and the median over rounds of the ratio to the first one.

    A round of decoding is a few steps of each contender on the cache of its own prompts, so that the two
    sides of a ratio are seconds apart; prompts take long, so that there are fewer rounds of them.
    """
    order, shuffle = list(contenders), random.Random(0)
    caches: dict[str, DynamicCache] = {}
    rounds: list[dict[str, dict[str, float]]] = []
    turns: list[dict[str, float]] = []
    for _ in range(WARM_UP + sizes.rounds):
        shuffle.shuffle(order)
        rounds.append({})
        for name in order:
            caches[name] = DynamicCache()
            rounds[-1][name] = prefill(contenders[name], ids, caches[name])
            contenders[name].finish()
    for _ in range(sizes.decode_rounds + 1):
        shuffle.shuffle(order)
        turns.append({})
        for name in order:
            contenders[name].prepare()
            turns[-1][name] = decode(contenders[name], ids, caches[name], sizes.steps)
            contenders[name].finish()
    del rounds[:WARM_UP], turns[0]  # they warm up
    first = next(iter(contenders))
    table: dict[str, dict[str, Any]] = {}
    for name in contenders:
        table[name] = {"bind": {"seconds": statistics.median(one[name]["bind"] for one in rounds)}}
        for phase in ("prefill", "request"):
            table[name][phase] = summarize([(one[name][phase], one[first]["prefill"]) for one in rounds])
        table[name]["decode"] = summarize([(one[name], one[first]) for one in turns])
    return table


def summarize(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Median seconds of a contender, and its ratio to the frozen model's of the same round with quartiles."""
    ratios = [seconds / base for seconds, base in pairs]
    lower, middle, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "seconds": statistics.median(seconds for seconds, _ in pairs),
        "ratio": middle,
        "range": [lower, upper],
    }


def measure_layers(backbone: Backbone, frozen: nn.Module, sizes: Sizes, ids: Tensor) -> dict[str, Any]:
    """Figures 1 and 2 (mixed batch): ours and PEFT's on the layers of a batch, beside the frozen model."""
    found: dict[str, Any] = {}
    bound = backbone.reparameterizer
    for which in ("all-linear", "attention-output"):
        increments = random_increments(backbone, backbone.targets(which, 0), sizes.stored, sizes.rank)
        mixed = mixture_of(increments, *draw_mixture(increments, sizes.rows))
        alike = torch.zeros(sizes.rows, 1, dtype=torch.long)
        same = Mixture(increments[:1], alike, torch.ones(sizes.rows, 1))
        pair = Mixture(increments[:2], alike + torch.arange(2), torch.full((sizes.rows, 2), 0.5))
        own = [str(row % sizes.stored) for row in range(sizes.rows)]
        distinct = increments[: min(sizes.rows, sizes.stored)]
        peft = rivals.with_adapters(copy.deepcopy(frozen), distinct, backbone.dtype)

        def cold(mixture: Mixture = mixed) -> None:
            bound.bank.clear()
            bound.bind(mixture)

        contenders = {
            "frozen": Contender(frozen),
            "every row its own two": Contender(backbone.model, lambda m=mixed: bound.bind(m), bound.release),
            "the same, none of them loaded": Contender(backbone.model, cold, bound.release),
            "all rows one task": Contender(backbone.model, lambda m=same: bound.bind(m), bound.release),
            "all rows the same two": Contender(backbone.model, lambda m=pair: bound.bind(m), bound.release),
            "merged": Contender(
                backbone.model, lambda x=increments[0]: merge(backbone, x), lambda: unmerge(backbone)
            ),
            "PEFT, every row its own one": Contender(peft, extra={"adapter_names": own}),
        }
        found[which] = take_turns(contenders, ids, sizes)
        print(render_turns(which, found[which]), flush=True)
        del peft, contenders
        gc.collect()
    return found


@torch.inference_mode()
def measure_routed(backbone: Backbone, frozen: nn.Module, sizes: Sizes, ids: Tensor) -> dict[str, Any]:
    """Figure 2 (X-LoRA, Arrow, full weight changes), on a batch small enough for them."""
    increments = random_increments(backbone, backbone.targets("all-linear", 0), sizes.stored // 2, sizes.rank)
    slots, weights = draw_mixture(increments, len(ids))
    mixed, bound = mixture_of(increments, slots, weights), backbone.reparameterizer
    found: dict[str, Any] = {}

    def ask(contender: Contender, num_steps: int, is_cached: bool) -> dict[str, float]:
        cache = DynamicCache() if is_cached else None
        seconds = prefill(contender, ids, cache)
        seconds["decode"] = decode(contender, ids, cache, num_steps)
        contender.finish()
        return seconds

    def note(name: str, contender: Contender, is_cached: bool = True) -> None:
        ask(contender, 1, is_cached)
        runs = [ask(contender, 3, is_cached) for _ in range(max(1, sizes.rounds // 2))]
        found[name] = {phase: statistics.median(run[phase] for run in runs) for phase in runs[0]}
        gc.collect()
        found[name]["peak_mib"] = peak_mib(lambda: ask(contender, 1, is_cached), ids.device)
        print(f"{name}: {found[name]}", flush=True)

    note("frozen", Contender(frozen))
    note("every row its own two", Contender(backbone.model, lambda: bound.bind(mixed), bound.release))
    full = rivals.with_full_changes(copy.deepcopy(frozen), increments, slots, weights)
    note("full weight changes", Contender(full))
    del full
    with tempfile.TemporaryDirectory() as folder:
        folders = rivals.save_adapters(frozen, increments, Path(folder))
        note("PEFT Arrow", Contender(rivals.arrow(copy.deepcopy(frozen), folders)))
        note("PEFT X-LoRA (no cache)", Contender(rivals.x_lora(copy.deepcopy(frozen), folders)), False)
    return found


PARTS = ("layers", "routed", "training", "growth", "pool")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--name", default="reparameterize", help="of the files, one name for each machine")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--keep", action="store_true", help="keep the other parts of the file that is there")
    parser.add_argument("--rounds", type=int, default=Sizes.rounds)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see whether it runs")
    parser.add_argument("--processor-time", action="store_true", help="of one thread, instead of wall time")
    options = parser.parse_args()
    if options.processor_time:
        torch.set_num_threads(1)
        CLOCK[0] = time.process_time
    sizes = QUICK if options.quick else Sizes(rounds=options.rounds)
    rivals.quietly()
    keep_freed_memory()
    backbone = load_backbone("smollm2")
    frozen = rivals.plain_copy(backbone)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 40_000, (sizes.rows, sizes.tokens), generator=draw).to(backbone.device)
    target = options.out / f"{options.name}.json"
    kept: dict[str, Any] = json.loads(target.read_text()) if options.keep else {}
    machine = describe_machine(backbone, CLOCK[0].__name__)
    commits = {**kept.get("commits", {}), **dict.fromkeys(options.parts, machine["commit"])}
    commits = {part: commits[part] for part in PARTS if part in commits}
    found: dict[str, Any] = {**kept, "machine": machine, "sizes": asdict(sizes), "commits": commits}
    measures: dict[str, Callable[[], Any]] = {
        "layers": lambda: measure_layers(backbone, frozen, sizes, ids),
        "routed": lambda: measure_routed(
            backbone, frozen, sizes, ids[: sizes.routed_rows, : sizes.routed_tokens]
        ),
        "training": lambda: measure_training(backbone, frozen, options.quick, CLOCK[0]),
        "growth": lambda: measure_growth(options.quick, CLOCK[0]),
        "pool": lambda: measure_pool(options.quick),
    }
    for name in options.parts:
        begun = time.perf_counter()
        found[name] = measures[name]()
        print(f"{name}: {time.perf_counter() - begun:.0f} s", flush=True)
        gc.collect()
    page = render({"layers": {}, **found})
    print(page)
    options.out.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found, indent=1) + "\n")
    target.with_suffix(".md").write_text(page)


if __name__ == "__main__":
    main()
