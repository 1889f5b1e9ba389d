"""What it saves to keep freed memory for the next pass (``slm.backbone.memory``).

    python benchmarks/freed_memory.py

Learns and answers in processes of one thread that differ in two environment variables, in turns. A ratio is
the median over rounds of processor time with them divided by the time without. Writes
``<out>/freed_memory.json`` and ``<out>/freed_memory.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core_stream import environment

from slm.backbone.memory import ENVIRONMENT

ROWS = {"minilm": (300, 300), "smollm2": (64, 64)}
"""Film reviews that are learned and that are asked."""

PHASES = ("learn", "ask")


def work(backbone: str) -> dict[str, Any]:
    """Processor seconds and new pages of learning one task and of answering, in this process."""
    import torch

    from slm import Config, ScalableLM
    from slm.config import BackboneConfig, LearningConfig
    from slm.tasks.packaged import film_sentiment

    torch.set_num_threads(1)
    num_learned, num_asked = ROWS[backbone]
    task = film_sentiment(num_learned, num_asked)
    learning = LearningConfig(num_epochs=1, is_truncating=True, has_progress=False)
    config = Config(backbone=BackboneConfig(max_tokens=128), learning=learning)
    found: dict[str, Any] = {}

    def measure(phase: str, run: Callable[[], object]) -> None:
        begun, pages = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        run()
        found[phase] = {
            "seconds": time.process_time() - begun,
            "pages": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - pages,
        }

    with tempfile.TemporaryDirectory() as folder:
        model = ScalableLM.create(Path(folder) / "store", backbone, config)
        measure("learn", lambda: model.learn(task))
        questions = [example.prompt for example in task.test]
        measure("ask", lambda: model.ask(questions, is_truncating=True))
    return {**found, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def start(backbone: str, is_kept: bool) -> dict[str, Any]:
    """The same in a process of its own."""
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, __file__, "--work", backbone]
    done = subprocess.run(
        command,
        env=surroundings | (dict(ENVIRONMENT) if is_kept else {}) | {"OMP_NUM_THREADS": "1"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def render(found: dict[str, Any]) -> str:
    """The page."""
    machine = found["environment"]
    lines = [
        "<!-- written by benchmarks/freed_memory.py -->",
        "",
        f"Processor seconds of one thread, {found['rounds']} rounds in turns; ratios are medians "
        f"(quartiles in brackets). torch {machine['torch']}, commit {machine['commit'][:7]}.",
        "",
        "| backbone | what | given back, s | kept, s | ratio | new pages | kept | peak, MiB | kept |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for backbone, turns in found["backbones"].items():
        for phase, number in zip(PHASES, ROWS[backbone], strict=True):
            pairs = [(plain[phase], kept[phase]) for plain, kept in turns]
            ratios = [kept["seconds"] / plain["seconds"] for plain, kept in pairs]
            lower, middle, upper = statistics.quantiles(ratios, n=4, method="inclusive")
            seconds = [statistics.median(pair[side]["seconds"] for pair in pairs) for side in (0, 1)]
            pages = [statistics.median(pair[side]["pages"] for pair in pairs) for side in (0, 1)]
            peaks = [statistics.median(turn[side]["peak_mib"] for turn in turns) for side in (0, 1)]
            lines.append(
                f"| {backbone} | {phase} {number} rows | {seconds[0]:.1f} | {seconds[1]:.1f} | {middle:.3f} "
                f"({lower:.2f}-{upper:.2f}) | {pages[0]:,.0f} | {pages[1]:,.0f} | {peaks[0]:,.0f} | "
                f"{peaks[1]:,.0f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure in turns, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print(json.dumps(work(options.work)))
        return
    found: dict[str, Any] = {"environment": environment(), "rounds": options.rounds, "backbones": {}}
    for backbone in ROWS:
        turns = found["backbones"][backbone] = []
        for number in range(options.rounds):
            turn = {is_kept: start(backbone, is_kept) for is_kept in (number % 2 == 0, number % 2 != 0)}
            turns.append((turn[False], turn[True]))
            print(backbone, number, turns[-1], flush=True)
    page = render(found)
    print(page)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "freed_memory.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / "freed_memory.md").write_text(page)


if __name__ == "__main__":
    main()
