"""Few shots on T5, as in the paper: 16 examples a class, orders 1 to 3, label words, and a task of free text.

    python benchmarks/t5_few_shot.py --data FOLDER --model ~/.cache/slm/small-t5             # three draws
    python benchmarks/t5_few_shot.py --data FOLDER --model ~/.cache/slm/small-t5 --preset quick

16 examples a class to learn from and 16 to stop by, drawn anew for every seed; 128 tokens; encoder and
decoder re-parameterized; answers are label words that the decoder scores. Test rows are shuffled over tasks,
and no question says which task it is of. The model is that of ``small_t5.py``, pretrained on first use and
kept in ``--model``. Writes ``<out>/t5_few_shot.json`` and ``<out>/t5_few_shot.md``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from core_stream import arrive_in_order, environment, timed
from small_t5 import pretrain

from slm import Config, ScalableLM, Stream, Task
from slm.backbone.backbone import Backbone
from slm.backbone.decode import prefill, score_labels
from slm.backbone.generate import generate
from slm.backbone.load import load_backbone
from slm.config import BackboneConfig, LearningConfig
from slm.evaluation.matrix import prompt_of
from slm.evaluation.scorers import scorer_for

ORDERS = (
    ("dbpedia", "amazon", "yahoo", "agnews"),
    ("dbpedia", "amazon", "agnews", "yahoo"),
    ("yahoo", "amazon", "agnews", "dbpedia"),
)
FREE_TEXT = "e2e_nlg"
WORDS = {
    "very negative": "terrible",
    "negative": "bad",
    "neutral": "middle",
    "positive": "good",
    "very positive": "wonderful",
    "science or technology": "science",
}
"""Label words where the data's own name is not one; the others are their names in lower case."""
PRESETS = {"full": {"seeds": 3, "test": 250}, "quick": {"seeds": 1, "test": 60}}
SHOTS = 16
METRICS = ("average", "forgetting", "misrouting", "oracle_average", "oracle_gap", "false_refusal_rate")


def arguments() -> argparse.Namespace:
    """The command line; the preset's numbers may be overruled one by one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of <task>/{train,test}.jsonl")
    parser.add_argument("--model", type=Path, required=True, help="folder of the small T5, made when missing")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--seeds", type=int, help="draws of the examples")
    parser.add_argument("--test", type=int, help="test rows of each task")
    parser.add_argument("--free-train", type=int, default=300, help="examples of the free-text task")
    parser.add_argument("--free-epochs", type=int, default=8)
    args = parser.parse_args()
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def settings(seed: int) -> Config:
    """Few examples take more epochs and a higher rate than many."""
    return Config(
        backbone=BackboneConfig(dtype="float32", max_tokens=128),
        learning=LearningConfig(
            num_epochs=30,
            patience=4,
            learning_rate=3e-3,
            batch_size=8,
            validation_share=0.5,
            is_truncating=True,
            seed=seed,
            has_progress=False,
        ),
    )


def in_words(task: Task) -> Task:
    """A task whose labels are label words."""

    def word(label: str | None) -> str:
        low = (label or "").lower()
        return WORDS.get(low, low)

    return replace(
        task,
        labels=tuple(sorted(word(label) for label in task.labels)),
        examples=tuple(replace(e, target=word(e.target)) for e in task.examples),
        test=tuple(replace(e, target=word(e.target)) for e in task.test),
    )


def frozen_scores(backbone: Backbone, stream: Stream, limit: int, seed: int) -> dict[str, float]:
    """What the frozen T5 scores where it is told the task's label words: more than slm is told."""
    found = {}
    for task in stream:
        own = [example for _, example in Stream((task,)).mixed_test(limit, seed)]
        answers: list[str] = []
        for start in range(0, len(own), 32):
            chunk = own[start : start + 32]
            rows = [backbone.row(prompt_of(e), is_truncating=True, where="row") for e in chunk]
            begun, which = prefill(backbone, backbone.batch(rows)), range(len(chunk))
            if task.labels:
                scores = score_labels(backbone, begun, which, [task.labels] * len(chunk))
                answers += [task.labels[int(own_scores.argmax())] for own_scores in scores]
            else:
                answers += [texts[0].text for texts in generate(backbone, begun, which, 64)]
        found[task.name] = scorer_for(task)(answers, [e.target or "" for e in own])
    return found


def run_seed(
    args: argparse.Namespace, backbone: Backbone, stream: Stream, seed: int, root: Path
) -> dict[str, Any]:
    """Every task learned once from one draw, and measured in every order."""
    drawn = Stream(tuple(task.sample_per_label(2 * SHOTS, seed) for task in stream))
    source = ScalableLM.create(root / "source", backbone, settings(seed))
    with timed(f"seed {seed}, learning"):
        reports = [source.learn(task).as_dict() for task in drawn]
    options = {"limit": args.test, "seed": seed, "is_truncating": True, "has_progress": False}
    orders = []
    for number, names in enumerate(ORDERS, start=1):
        # Learning looks at nothing but the task itself: in another order it would give the same bytes.
        model = ScalableLM.create(root / str(number), backbone, settings(seed))
        arrive_in_order(source, model, names)
        ordered = drawn.order(names)
        with timed(f"seed {seed}, order {number}"):
            ours = model.evaluate(ordered, **options).as_dict()
        if number == 1:
            eager = model.restricted(names, is_abstaining=False)
            answering = eager.evaluate(ordered, **options).as_dict()
        orders.append({"order": names, **ours})
    with timed(f"seed {seed}, frozen"):
        frozen = frozen_scores(backbone, drawn, args.test, seed)
    return {
        "seed": seed,
        "orders": orders,
        "never_abstaining": answering,
        "frozen": frozen,
        "reports": reports,
    }


def run_free_text(args: argparse.Namespace, backbone: Backbone, stream: Stream, root: Path) -> dict[str, Any]:
    """A fifth task, of free text, after the four of order 1."""
    (task,) = Stream.load(args.data, [FREE_TEXT], limit=args.free_train, test_limit=args.test)
    model = ScalableLM.open(root / "1", backbone)
    with timed("free text"):
        report = model.learn(task, num_epochs=args.free_epochs, validation_share=0.1)
        five = Stream((*stream.order(ORDERS[0]), task))
        options = {"limit": args.test, "is_truncating": True, "has_progress": False}
        found = model.evaluate(five, max_new_tokens=64, **options).as_dict()
        frozen = frozen_scores(backbone, Stream((task,)), args.test, 0)[task.name]
        shown = [prompt_of(example) for example in task.test[:3]]
        texts = [answer.text for answer in model.ask(shown, max_new_tokens=64, is_truncating=True)]
    pairs = [{"prompt": p, "answer": t} for p, t in zip(shown, texts, strict=True)]
    return {"evaluation": found, "frozen": frozen, "report": report.as_dict(), "examples": pairs}


def layers_of(model: ScalableLM) -> dict[str, int]:
    """How many layers bend, by part of the model."""
    return {
        part: sum(name.startswith(f"{part}.") for name in model.targets) for part in ("encoder", "decoder")
    }


def table(results: dict[str, Any]) -> list[str]:
    """The results as Markdown."""
    runs = results["seeds"]
    small, bent = results["pretraining"], results["layers"]
    lines = [
        f"A T5 of {small['num_parameters'] / 1e6:.1f} million parameters, pretrained from nothing on "
        f"packaged texts for {small['num_steps']} steps. {SHOTS} examples a class to learn from and {SHOTS} "
        f"to stop by, {len(runs)} draws; {results['test']} test rows a task, asked in shuffled mixed "
        f"batches, no task-ID. {bent['encoder']} linear layers of the encoder and {bent['decoder']} of the "
        "decoder bend. Points of accuracy, mean ± sample standard deviation over draws. The frozen T5 is "
        "told each task's label words.",
        "",
        "| order | average | forgetting | misrouting | oracle | oracle gap | false refusals | frozen T5 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    frozen = spread([fmean(run["frozen"].values()) for run in runs])
    for number, names in enumerate(ORDERS):
        cells = [spread([run["orders"][number][metric] for run in runs]) for metric in METRICS]
        lines.append(f"| {number + 1}: {', '.join(names)} | " + " | ".join([*cells, frozen]) + " |")
    eager = [spread([run["never_abstaining"][metric] for run in runs]) for metric in METRICS]
    lines += [f"| 1, never abstaining | {' | '.join([*eager, frozen])} |", "", *per_task(runs)]
    return lines + free_table(results["free_text"])


def per_task(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Each task after the last one of order 1."""
    lines = ["| task (order 1) | last | oracle | misrouting | frozen T5 |", "|---|---:|---:|---:|---:|"]
    for j, name in enumerate(ORDERS[0]):
        first = [run["orders"][0] for run in runs]
        cells = [
            spread([run["scores"][-1][j] for run in first]),
            spread([run["oracle"][j] for run in first]),
            spread([run["task_misrouting"][j] for run in first]),
            spread([run["frozen"][name] for run in runs]),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def free_table(free: dict[str, Any]) -> list[str]:
    """The task of free text, learned fifth."""
    found = free["evaluation"]
    j = found["tasks"].index(FREE_TEXT)
    first = free["examples"][0]
    return [
        "",
        f"Free text: {FREE_TEXT}, {free['report']['num_examples']} examples, learned fifth (first draw): "
        f"{found['metrics'][j]} {100 * found['scores'][-1][j]:.1f}, oracle {100 * found['oracle'][j]:.1f}, "
        f"frozen T5 {100 * free['frozen']:.1f}; forgetting over all five {100 * found['forgetting']:.2f}. "
        f"Asked `{first['prompt'].splitlines()[1]}`, it writes: {first['answer']!r}",
    ]


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation, in percent."""
    mean = f"{100 * fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * stdev(values):.1f}"


def main() -> None:
    """Pretrain or find the model, run every seed, write the files."""
    args = arguments()
    if not (args.model / "config.json").is_file():
        with timed("pretraining the small T5"):
            pretrain(args.model)
    backbone = load_backbone(str(args.model), settings(0).backbone)
    stream = Stream(tuple(in_words(task) for task in Stream.load(args.data, sorted(ORDERS[0]))))
    with tempfile.TemporaryDirectory() as folder:
        roots = [Path(folder) / str(seed) for seed in range(args.seeds)]
        seeds = [run_seed(args, backbone, stream, seed, root) for seed, root in enumerate(roots)]
        layers = layers_of(ScalableLM.open(roots[0] / "1", backbone))
        free = run_free_text(args, backbone, stream, roots[0])
    results = {
        "pretraining": json.loads((args.model / "pretraining.json").read_text()),
        "layers": layers,
        "seeds": seeds,
        "free_text": free,
        "test": args.test,
        "preset": args.preset,
        "environment": environment(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "t5_few_shot.json").write_text(json.dumps(results, indent=1) + "\n")
    lines = ["<!-- written by benchmarks/t5_few_shot.py -->", "", *table(results)]
    (args.out / "t5_few_shot.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
