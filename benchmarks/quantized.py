"""What quantised frozen weights save, cost and change, against the same model's floats in the same run.

    python benchmarks/quantized.py                  # MiniLM and SmolLM2 on the CPU, some minutes
    python benchmarks/quantized.py --preset quick   # fewer rounds, examples and test rows

Times are medians of interleaved rounds, as ratios to the float model. Each model learns one short task on
floats and on codes, and both answer the same test rows. Writes ``<out>/quantized.json`` and
``<out>/quantized.md``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from core_stream import environment, timed

from slm import Config, ScalableLM, Task
from slm.backbone.backbone import Backbone, BackboneKind
from slm.backbone.decode import cache_of, prefill
from slm.backbone.load import load_backbone
from slm.backbone.quantization import PACKAGES, stored_parts
from slm.config import BackboneConfig, LearningConfig
from slm.tasks.packaged import question_languages

OWN_PRODUCT = "bnb-int8, its own product"
"""bitsandbytes' LLM.int8(), which slm does not use: activations are quantised as well."""
PRESETS = {"full": {"rounds": 9, "train": 200, "test": 200}, "quick": {"rounds": 3, "train": 40, "test": 30}}
PROMPTS = [
    "Shares rose.",
    "The striker scored twice in the second half before the rain stopped the match for good.",
    "Which minister resigned after the vote on Monday evening?",
    "A warm and funny film with a cast that seems to enjoy every minute of it.",
]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--models", default="minilm,smollm2")
    parser.add_argument("--dtype", default="float32", help="of the activations, and of the float weights")
    args = parser.parse_args()
    for name, value in PRESETS[args.preset].items():
        setattr(args, name, value)
    return args


def size_of(backbone: Backbone) -> tuple[int, int]:
    """Bytes of the layers that bend, and of the whole model; a tied matrix counts once."""
    layers = {id(x.base) for x in backbone.reparameterizer.layers.values()}
    bent = whole = 0
    seen = set()
    for module in backbone.model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                size = sum(part.numel() * part.element_size() for _, part in stored_parts(name, tensor))
                size += scales_of(module, name)
                whole += size
                bent += size if id(module) in layers else 0
    return bent, whole


def scales_of(module: Any, name: str) -> int:
    """Bytes that bitsandbytes keeps beside a weight's codes."""
    if name != "weight":
        return 0
    state = getattr(module.weight, "quant_state", None)
    beside = [state.absmax, state.code] if state is not None else []
    if type(module).__name__ == "Linear8bitLt":
        beside = [module.state.SCB]
    return sum(tensor.numel() * tensor.element_size() for tensor in beside)


def passes_of(backbone: Backbone) -> dict[str, Callable[[], Any]]:
    """What is timed: one pass over 8 rows of 48 tokens, and for a writer 8 single tokens behind it."""
    ids = torch.randint(10, 1000, (8, 48), generator=torch.Generator().manual_seed(0))
    rows = [backbone.row(PROMPTS[1], is_truncating=False, where="row")] * 8
    batch = backbone.batch(rows)
    filled = type(batch)(
        **{
            **{name: getattr(batch, name) for name in type(batch).__slots__},
            "ids": ids.to(backbone.device),
            "mask": torch.ones_like(ids, dtype=torch.bool).to(backbone.device),
            "content": torch.ones_like(ids, dtype=torch.bool).to(backbone.device),
            "positions": torch.arange(48).repeat(8, 1).to(backbone.device),
        }
    )
    if backbone.kind is BackboneKind.ENCODER:
        return {"pass": lambda: backbone.pooled(filled)}
    start = prefill(backbone, filled)
    every = torch.arange(8, device=backbone.device)

    def decode() -> None:
        cache, token = cache_of(start, every), start.logits.argmax(-1, keepdim=True)
        for _ in range(8):
            found = backbone.model(input_ids=token, past_key_values=cache, use_cache=True)
            token = found.logits[:, -1:].argmax(-1)

    return {"pass": lambda: prefill(backbone, filled), "decode": decode}


@torch.no_grad()
def times(backbones: dict[str, Backbone], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of each pass and method, the methods taking turns."""
    passes = {method: passes_of(backbone) for method, backbone in backbones.items()}
    found: dict[str, dict[str, list[float]]] = {m: {p: [] for p in passes[m]} for m in passes}
    for number in range(rounds + 1):
        for method, own in passes.items():
            for name, run in own.items():
                begun = time.perf_counter()
                run()
                if number:  # the first round warms up
                    found[method][name].append(time.perf_counter() - begun)
    return {m: {name: median(values) for name, values in own.items()} for m, own in found.items()}


@torch.no_grad()
def apart(backbone: Backbone) -> float:
    """Largest difference between a row's outputs in a batch and alone, as a share of the largest output."""

    def outputs(texts: list[str]) -> list[torch.Tensor]:
        batch = backbone.batch([backbone.row(t, is_truncating=False, where="row") for t in texts])
        found = backbone.model(**backbone.inputs(batch))
        values = found.logits if hasattr(found, "logits") else found.last_hidden_state
        return [own[mask].float() for own, mask in zip(values, batch.mask, strict=True)]

    together = outputs(PROMPTS)
    largest = max(float(own.abs().max()) for own in together)
    differences = [
        float((outputs([t])[0] - own).abs().max()) for t, own in zip(PROMPTS, together, strict=True)
    ]
    return max(differences) / largest


def own_product_apart(backbone: Backbone) -> float:
    """The same with the product that bitsandbytes itself would use."""
    bases = [layer.base for layer in backbone.reparameterizer.layers.values()]
    kept = [base.__dict__.pop("forward") for base in bases]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it notes the rounding of every product
    try:
        return apart(backbone)
    finally:
        for base, forward in zip(bases, kept, strict=True):
            base.forward = forward


def learn(backbone: Backbone, task: Task, folder: Path) -> dict[str, Any]:
    """Answers and accuracy after one short task."""
    config = Config(
        learning=LearningConfig(num_epochs=2, batch_size=8, is_truncating=True, has_progress=False)
    )
    model = ScalableLM.create(folder, backbone, config)
    report = model.learn(task)
    oracle = model.restricted([task.name], is_abstaining=False)
    answers = [a.text for a in oracle.ask([e.prompt for e in task.test], is_truncating=True)]
    right = [answer == e.target for answer, e in zip(answers, task.test, strict=True)]
    return {"answers": answers, "accuracy": sum(right) / len(right), "time_s": report.time_s}


def measure(args: argparse.Namespace, source: str) -> dict[str, Any]:
    """Everything about one model."""
    methods = ["none", *(m for m, package in PACKAGES.items() if importlib.util.find_spec(package))]
    backbones = {}
    for method in methods:
        settings = BackboneConfig(dtype=args.dtype, max_tokens=128, quantization=method)
        backbones[method] = load_backbone(source, settings)
    task = question_languages(args.train, args.test)
    with timed(f"{source}, speed"):
        spent = times(backbones, args.rounds)
    found: dict[str, Any] = {"task": task.name, "methods": {}}
    for method, backbone in backbones.items():
        bent, whole = size_of(backbone)
        with timed(f"{source}, {method}, learning {task.name}"), tempfile.TemporaryDirectory() as folder:
            learned = learn(backbone, task, Path(folder) / "store")
        found["methods"][method] = {
            "layers_bytes": bent,
            "model_bytes": whole,
            "times_s": spent[method],
            "apart": apart(backbone),
            **learned,
        }
    if "bnb-int8" in backbones:
        found["own_product_apart"] = own_product_apart(backbones["bnb-int8"])
    return found


def table(results: dict[str, Any]) -> list[str]:
    """The results as Markdown."""
    lines = [
        f"Activations in {results['dtype']} on the {results['device']}, {results['environment']['threads']} "
        "threads. Times are ratios to the floats of the same run; `apart` is the largest difference between "
        "a row computed in a batch and alone, as a share of the largest output; `same` answers are those to "
        "the test rows of a task learned on floats and on codes.",
        "",
        "| model | weights | layers MiB | whole MiB | pass | decode | learning | apart | accuracy | same |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for source, found in results["models"].items():
        floats = found["methods"]["none"]
        for method, own in found["methods"].items():
            ratios = [own["times_s"].get(p, 0) / floats["times_s"].get(p, 1) for p in ("pass", "decode")]
            same = sum(a == b for a, b in zip(own["answers"], floats["answers"], strict=True))
            cells = [
                source,
                method,
                f"{own['layers_bytes'] / 2**20:.1f}",
                f"{own['model_bytes'] / 2**20:.1f}",
                *(f"{ratio:.2f}×" if ratio else "–" for ratio in ratios),
                f"{own['time_s'] / floats['time_s']:.2f}×",
                f"{own['apart']:.1e}",
                f"{100 * own['accuracy']:.1f}",
                f"{100 * same / len(floats['answers']):.1f}%",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        if "own_product_apart" in found:
            blank = " | ".join("–" * 5)
            lines.append(f"| {source} | {OWN_PRODUCT} | {blank} | {found['own_product_apart']:.1e} | – | – |")
    return lines


def main() -> None:
    """Measure each model, write the files."""
    args = arguments()
    results: dict[str, Any] = {
        "dtype": args.dtype,
        "device": "GPU" if torch.cuda.is_available() else "CPU",
        "preset": args.preset,
        "models": {source: measure(args, source) for source in args.models.split(",")},
        "environment": environment(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "quantized.json").write_text(json.dumps(results, indent=1) + "\n")
    lines = ["<!-- written by benchmarks/quantized.py -->", "", *table(results)]
    (args.out / "quantized.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
