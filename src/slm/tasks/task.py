"""One thing to learn: a name, a kind, examples, and for a classification its labels."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import final

from slm.checked import check_characters
from slm.errors import ConfigError, DataError, TaskError
from slm.tasks.sampling import fold, rank, share_proportionally

ROLES = ("system", "user", "assistant")
MIN_EXAMPLES_TO_SPLIT = 10
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class TaskKind(StrEnum):
    """What an answer is: one of a few labels, or free text."""

    CLASSIFICATION = "classification"
    GENERATION = "generation"

    @classmethod
    def parse(cls, kind: TaskKind | str) -> TaskKind:
        """Return the kind of that name.

        Raises:
            ConfigError: no kind has that name.
        """
        try:
            return cls(kind)
        except ValueError:
            allowed = " or ".join(f'"{member.value}"' for member in cls)
            raise ConfigError(
                f"kind must be {allowed}, got {kind!r}: use one of these or leave it out"
            ) from None


@final
@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: who speaks: "system", "user" or "assistant".
        content: what is said, never blank.
    """

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise DataError(f"role must be system, user or assistant, got {self.role!r}: use one of these")
        if not isinstance(self.content, str) or not self.content.strip():
            raise DataError(f"content must be text that is not blank, got {self.content!r}: fill it in")


@final
@dataclass(frozen=True, slots=True)
class Example:
    """One question, with its answer when it is known.

    Attributes:
        prompt: a plain text, or the conversation up to the answer.
        target: the label or the completion; None when only asking.
        place: file and line it was read from; empty where there are none. Equal examples may differ in it.
    """

    prompt: str | tuple[Message, ...]
    target: str | None = None
    place: str = field(default="", compare=False, repr=False)

    @property
    def prompt_text(self) -> str:
        """The prompt as one text; a conversation has one "role: content" paragraph for each turn."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n\n".join(f"{message.role}: {message.content}" for message in self.prompt)


@final
@dataclass(frozen=True)
class Task:
    """One thing to learn.

    Attributes:
        name: what the task is called in a store, `[a-z0-9][a-z0-9._-]{0,63}`.
        kind: classification or generation, or the name of one.
        examples: what is learned, at least one, each with a target.
        labels: every label, sorted; empty for a generation.
        test: examples kept for measuring; may be empty.

    Raises:
        TaskError: the name is not allowed.
        ConfigError: no kind has that name.
        DataError: an example or the labels cannot be used.
    """

    name: str
    kind: TaskKind
    examples: tuple[Example, ...]
    labels: tuple[str, ...] = ()
    test: tuple[Example, ...] = ()

    def __post_init__(self) -> None:
        check_name(self.name)
        object.__setattr__(self, "kind", TaskKind.parse(self.kind))
        if not self.examples:
            raise DataError(f'task "{self.name}" has no examples, at least 1 is needed: add some')
        self._check_labels()
        for part, examples in (("example", self.examples), ("test example", self.test)):
            for number, example in enumerate(examples, start=1):
                self._check_example(example, f'task "{self.name}", {part} {number}')

    def _check_labels(self) -> None:
        if self.kind is TaskKind.GENERATION:
            if self.labels:
                raise DataError(f'task "{self.name}" is a generation, which has no labels: leave them out')
            return
        if list(self.labels) != sorted(set(self.labels)):
            raise DataError(
                f'task "{self.name}": labels must be sorted and unique, got {self.labels!r}: sort them'
            )
        if len(self.labels) < 2:
            raise DataError(
                f'task "{self.name}": a classification needs at least 2 labels, got {len(self.labels)}: '
                'add examples of another label or set kind to "generation"'
            )

    def _check_example(self, example: Example, place: str) -> None:
        prompt, target = example.prompt, example.target
        if not isinstance(prompt, str) and not (
            isinstance(prompt, tuple) and all(isinstance(message, Message) for message in prompt)
        ):
            raise DataError(
                f"{place}: the prompt must be a text or a tuple of Message, got {prompt!r}: mend it"
            )
        if target is not None and not isinstance(target, str):
            raise DataError(f"{place}: the target must be a text, got {target!r}: write it as one")
        if not example.prompt_text.strip():
            raise DataError(f"{place}: the prompt is blank: fill it in or leave the example out")
        if target is None or not target.strip():
            raise DataError(f"{place}: the target is blank: fill it in or leave the example out")
        check_characters(example.prompt_text, f"{place}: the prompt")
        check_characters(target, f"{place}: the target")
        if self.kind is TaskKind.CLASSIFICATION and example.target not in self.labels:
            raise DataError(
                f"{place}: target {example.target!r} is none of the labels "
                f"{', '.join(self.labels)}: mend the target or add the label"
            )

    @classmethod
    def load(
        cls,
        name: str,
        source: str | Path,
        *,
        kind: TaskKind | str | None = None,
        test: str | Path | None = None,
        split: str = "train",
        limit: int | None = None,
        seed: int = 0,
    ) -> Task:
        """Read a task from a file or a Hugging Face data set; see :func:`slm.tasks.load.load_task`."""
        from slm.tasks.load import load_task

        return load_task(name, source, kind=kind, test=test, split=split, limit=limit, seed=seed)

    @classmethod
    def from_rows(
        cls, name: str, rows: Iterable[Mapping[str, object]], kind: TaskKind | str | None = None
    ) -> Task:
        """Make a task from rows in memory, in any shape that a file may have.

        Args:
            name: name of the task.
            rows: dictionaries, for instance {"text": ..., "label": ...}.
            kind: classification or generation; None reads it off the rows' shape.

        Raises:
            TaskError: the name is not allowed.
            DataError: a row cannot be used; the message names it.
            ConfigError: the kind is unknown.
        """
        from slm.tasks.rows import Row, collect_labels, to_examples

        check_name(name)
        numbered = []
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, Mapping):
                raise DataError(
                    f"row {number}: expected a dictionary such as "
                    f'{{"text": "...", "label": "..."}}, got {row!r}: mend it or leave it out'
                )
            numbered.append(Row("", "row", number, row))
        found, examples = to_examples(numbered, kind, origin="rows")
        return cls(name, found, tuple(examples), collect_labels(examples, found, origin="rows"))

    def sample(self, num_examples: int, seed: int = 0) -> Task:
        """Return the task with fewer examples, drawn in proportion to its labels.

        Args:
            num_examples: examples to keep; all are kept where there are no more.
            seed: chooses the draw; the order of the examples does not matter.

        Raises:
            ConfigError: num_examples is below 1.
        """
        if num_examples < 1:
            raise ConfigError(f"num_examples must be at least 1, got {num_examples}: raise it")
        return replace(self, examples=draw(self.examples, self.kind, num_examples, seed))

    def sample_per_label(self, num_examples: int, seed: int = 0) -> Task:
        """Return the task with as many examples of each label: few-shot learning's "16 per class".

        Args:
            num_examples: examples to keep of each label; a label that has fewer keeps all.
            seed: chooses the draw, which contains that of a smaller number.

        Raises:
            ConfigError: num_examples is below 1.
            TaskError: the task is a generation, which has no labels.
        """
        if num_examples < 1:
            raise ConfigError(f"num_examples must be at least 1, got {num_examples}: raise it")
        if self.kind is TaskKind.GENERATION:
            raise TaskError(f"task {self.name!r} is a generation, which has no labels: use sample")
        shares = dict.fromkeys(self.labels, num_examples)
        return replace(self, examples=_draw_shares(self.examples, self.kind, shares, seed))

    def split(
        self, validation_share: float, seed: int = 0, max_rows: int = 512
    ) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
        """Set examples aside for validation, stratified over labels; equal prompts stay together.

        Args:
            validation_share: part of the distinct prompts to set aside, 0 ≤ share < 1.
            seed: chooses them; nothing else does, neither the order nor another task.
            max_rows: most examples to set aside.

        Returns:
            Examples to train on and examples to validate on, each in the task's order. Validation is
            empty below 10 examples, and no label loses its last prompt to it.

        Raises:
            ConfigError: validation_share or max_rows is out of range.
        """
        if not 0 <= validation_share < 1:
            raise ConfigError(f"validation_share must be in 0 ≤ share < 1, got {validation_share}: lower it")
        if max_rows < 0:
            raise ConfigError(f"max_rows must be at least 0, got {max_rows}: raise it")
        if len(self.examples) < MIN_EXAMPLES_TO_SPLIT or validation_share == 0:
            return self.examples, ()
        held = self._choose_validation(validation_share, seed, max_rows)
        train = tuple(example for row, example in enumerate(self.examples) if row not in held)
        return train, tuple(self.examples[row] for row in sorted(held))

    def _choose_validation(self, validation_share: float, seed: int, max_rows: int) -> set[int]:
        rows_of: defaultdict[str, list[int]] = defaultdict(list)
        for row, example in enumerate(self.examples):
            rows_of[fold(example.prompt_text)].append(row)
        labels_of = {
            prompt: {_stratum(self.examples[row], self.kind) for row in rows}
            for prompt, rows in rows_of.items()
        }
        left = Counter(label for labels in labels_of.values() for label in labels)
        strata: defaultdict[str, list[str]] = defaultdict(list)
        for prompt, labels in labels_of.items():
            strata[min(labels)].append(prompt)
        wanted = min(max(1, round(validation_share * len(rows_of))), max_rows)
        shares = share_proportionally(wanted, {label: len(texts) - 1 for label, texts in strata.items()})
        held: set[int] = set()
        for label in sorted(strata):
            for prompt in sorted(strata[label], key=lambda text: rank(seed, text))[: shares[label]]:
                is_last = any(left[own] == 1 for own in labels_of[prompt])
                if len(held) + len(rows_of[prompt]) <= max_rows and not is_last:
                    held.update(rows_of[prompt])
                    left.subtract(labels_of[prompt])
        return held

    def digest(self) -> str:
        """Return the SHA-256 of kind, labels, examples and test, in hexadecimal; the name is left out."""
        content = [self.kind.value, self.labels, *(_plain(part) for part in (self.examples, self.test))]
        return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()


def check_name(name: str) -> None:
    """Refuse a name that no task may have.

    Raises:
        TaskError: the name is not allowed.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise TaskError(
            f"task name {name!r} is not allowed: use 1 to 64 of a-z, 0-9, dot, hyphen and underscore, "
            "the first one a letter or a digit"
        )


def draw(examples: tuple[Example, ...], kind: TaskKind, num_examples: int, seed: int) -> tuple[Example, ...]:
    """Draw examples in proportion to their labels and return them in their old order."""
    if num_examples >= len(examples):
        return examples
    sizes = Counter(_stratum(example, kind) for example in examples)
    return _draw_shares(examples, kind, share_proportionally(num_examples, sizes), seed)


def _draw_shares(
    examples: tuple[Example, ...], kind: TaskKind, shares: Mapping[str, int], seed: int
) -> tuple[Example, ...]:
    strata: defaultdict[str, list[int]] = defaultdict(list)
    for row, example in enumerate(examples):
        strata[_stratum(example, kind)].append(row)
    ranks = [rank(seed, f"{example.prompt_text}\n{example.target}") for example in examples]
    kept = {row for y, rows in strata.items() for row in sorted(rows, key=ranks.__getitem__)[: shares[y]]}
    return tuple(examples[row] for row in sorted(kept))


def _stratum(example: Example, kind: TaskKind) -> str:
    return (example.target or "") if kind is TaskKind.CLASSIFICATION else ""


def _plain(examples: tuple[Example, ...]) -> list[object]:
    return [
        [e.prompt if isinstance(e.prompt, str) else [[m.role, m.content] for m in e.prompt], e.target]
        for e in examples
    ]
