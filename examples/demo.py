"""The main job in a few minutes on two cores: teach real models real tasks, then ask without a task-ID.

First act: MiniLM learns four tasks from packaged texts, one after another; sequential fine-tuning does the
same beside it. Second act: SmolLM2 learns a classification and a generation. Run by ``make demo``.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import shorten

from rich.console import Console
from rich.table import Table

from slm import Answer, Config, ScalableLM, Stream, Task
from slm.bench.baselines.sequential import SequentialFineTuning
from slm.bench.report import Panel, plot_matrices
from slm.bench.rival import Setup
from slm.bench.run import Learner, run_stream
from slm.config import BackboneConfig, LearningConfig
from slm.evaluation.metrics import average, forgetting
from slm.tasks.packaged import (
    bbc_topics,
    film_sentiment,
    question_languages,
    question_topics,
    support_answers,
)

OUT = Path("out")
NUM_TEST = 60
NUM_EPOCHS = 4
OUTSIDER = "SELECT name, price FROM products WHERE price > 10 ORDER BY price DESC LIMIT 5;"
PROMPTS = [
    "What is an operating system?",
    "¿Cuál es tu comida favorita?",
    "What is a computer virus?",
    "Quale musica ascolti di solito?",
]

console = Console(width=100, highlight=False)


def settings(num_epochs: int, max_tokens: int = 96, batch_size: int = 16) -> Config:
    """The store's settings; everything not named is the default."""
    return Config(
        backbone=BackboneConfig(max_tokens=max_tokens),
        learning=LearningConfig(num_epochs=num_epochs, batch_size=batch_size, is_truncating=True),
    )


def first_act(folder: Path) -> None:
    """Four tasks, two learners, two matrices, a dozen questions."""
    stream = Stream(
        (
            bbc_topics(240, NUM_TEST),
            film_sentiment(240, NUM_TEST),
            question_topics(200, NUM_TEST),
            question_languages(240, NUM_TEST),
        )
    )
    console.rule("[bold]1. MiniLM learns four tasks, one after another")
    model = ScalableLM.create(folder / "minilm", "minilm", settings(NUM_EPOCHS))
    ours = follow("slm", model, stream, lambda: f"{len(model.tasks)} tasks in the store", is_truncating=True)
    rival = SequentialFineTuning(
        Setup(
            backbone=model.backbone,
            config=settings(NUM_EPOCHS - 1),
            seed=0,
            scratch=folder,
            learned=folder,
            settings={},
        )
    )
    theirs = follow("sequential fine-tuning", rival, stream, lambda: "one set of weights")
    for title, scores in (("slm", ours), ("sequential fine-tuning", theirs)):
        show_matrix(title, stream.names, scores)
    panels = [Panel("slm", stream.names, ours), Panel("sequential fine-tuning", stream.names, theirs)]
    console.print(f"Both matrices are drawn in {plot_matrices(panels, OUT / 'demo.png')}\n")
    console.rule("[bold]2. A dozen questions, no task-ID; one belongs to no task")
    held_out = [example for _, example in stream.mixed_test(3, seed=1)][:11]
    questions = [*(example.prompt_text for example in held_out[:6]), OUTSIDER]
    questions += [example.prompt_text for example in held_out[6:]]
    show_answers(questions, model.ask(questions, is_truncating=True))


def follow(
    title: str, learner: Learner, stream: Stream, state: Callable[[], str], **options: bool
) -> list[list[float | None]]:
    """Teach the stream, asking shuffled mixed batches after each task, and say how long it took."""
    begun = time.perf_counter()

    def learned(task: Task) -> None:
        spent = time.perf_counter() - begun
        console.print(f"  {title}: {task.name} learned and everything asked again, {spent:.0f} s, {state()}")

    return run_stream(learner, stream, limit=NUM_TEST, on_learned=learned, **options)


def second_act(folder: Path) -> None:
    """A causal model: label texts are scored, free answers are generated."""
    console.rule("[bold]3. SmolLM2 (a LLaMA) learns a classification and a generation")
    model = ScalableLM.create(folder / "smollm2", "smollm2", settings(2, max_tokens=64, batch_size=8))
    model.learn(question_languages(160, NUM_TEST))
    report = model.learn(support_answers(80, 20), num_epochs=3)
    console.print(
        f"  {len(model.tasks)} tasks, the last in {report.time_s:.0f} s, {report.size_bytes:,} bytes"
    )
    show_answers(PROMPTS, model.ask(PROMPTS, max_new_tokens=40))


def show_matrix(title: str, names: Sequence[str], scores: Sequence[Sequence[float | None]]) -> None:
    """An accuracy matrix with its two summaries."""
    table = Table(title=f"{title}: accuracy (%) on the task of the column", title_justify="left")
    table.add_column("after learning")
    for name in names:
        table.add_column(name, justify="right")
    for name, row in zip(names, scores, strict=True):
        table.add_row(name, *("" if value is None else f"{100 * value:.1f}" for value in row))
    console.print(table)
    drop = forgetting(scores)
    console.print(f"average {100 * average(scores):.1f}, forgetting {100 * (drop or 0.0):.1f} points\n")


def show_answers(questions: Sequence[str], answers: Sequence[Answer]) -> None:
    """Questions, answers and what was retrieved for them."""
    table = Table(show_lines=True)
    for column, ratio in (("question", 5), ("answer", 4), ("retrieved", 3)):
        table.add_column(column, ratio=ratio, overflow="fold")
    for question, answer in zip(questions, answers, strict=True):
        used = ", ".join(f"{task} {weight:.2f}" for task, weight in answer.tasks)
        text = answer.text if answer.text is not None else "-"
        table.add_row(shorten(question, 110, placeholder=" ..."), text, used or "no task: abstained")
    console.print(table)


def main() -> None:
    """Both acts, in a store that is thrown away afterwards."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="slm-demo-") as folder:
        first_act(Path(folder))
        second_act(Path(folder))
    console.print(f"Done in {time.perf_counter() - begun:.0f} s.")


if __name__ == "__main__":
    main()
