"""``slm ask``: answer questions without being told their task."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slm.cli.opening import open_model
from slm.cli.options import AsJson, IsTruncating, StoreFolder
from slm.cli.output import name_weights, print_json, print_line

if TYPE_CHECKING:
    from slm.answer import Answer

EXAMPLES = (
    'slm ask notes "A film that never ends, and should."',
    "slm ask notes --file questions.txt --json",
)


def ask(
    store: StoreFolder,
    questions: Annotated[
        list[str] | None,
        typer.Argument(metavar="QUESTION", help="What to ask; otherwise read from --file or standard input."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Questions, one a line, or a data file.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest generated answer.")] = 128,
    is_truncating: IsTruncating = False,
    task: Annotated[
        str | None, typer.Option(metavar="NAME", help="Use this task's knowledge and never abstain.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Answer questions of any learned task; what belongs to none is left to the frozen backbone."""
    if questions and file:
        raise typer.BadParameter("give questions or --file, not both")
    prompts = questions or _read(file)
    model = open_model(store)
    if task is not None:
        model = model.restricted([task], is_abstaining=False)
    answers = model.ask(prompts, max_new_tokens=max_new_tokens, is_truncating=is_truncating)
    if as_json:
        return print_json([answer.as_dict() for answer in answers])
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if len(answers) > 1:
            print_line(("\n" if number else "") + _one_line(prompt), "bold")
        _print_answer(answer)
    if any(answer.text is None for answer in answers):
        hint = (
            "slm explain shows why, --task NAME answers all the same"
            if model.tasks
            else "slm learn teaches one"
        )
        print_line(f"\n{hint}", "dim")


def _read(file: Path | None) -> list[Any]:
    """Questions of a file or of standard input, conversations as ``ask`` takes them."""
    from slm.tasks import read_questions

    if file is None and sys.stdin.isatty():
        sys.stderr.write("One question a line, end with Ctrl-D:\n")
    return [
        q if isinstance(q, str) else [{"role": m.role, "content": m.content} for m in q]
        for q in read_questions(file or sys.stdin)
    ]


def _one_line(prompt: str | Sequence[dict[str, str]]) -> str:
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return " ".join(text.split())


def _print_answer(answer: Answer) -> None:
    if answer.text is None:
        return print_line("abstained: this belongs to no learned task", "yellow")
    print_line(answer.text)
    source = name_weights(answer.tasks) or "abstained, the frozen backbone answered"
    print_line(f"confidence {answer.confidence:.2f}; {source}", "dim")
