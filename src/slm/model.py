"""``ScalableLM``: the one place where extractor, keys, increments and backbone meet."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from slm.answer import Answer, Explanation
from slm.backbone.backbone import Backbone, BackboneKind
from slm.backbone.bank import in_parts
from slm.backbone.decode import Prefill, prefill
from slm.backbone.generate import Generated, generate
from slm.backbone.load import lasting_source, load_backbone
from slm.backbone.merge import unmerge
from slm.backbone.prompts import Batch, Prompt, Question, prompts_of
from slm.backbone.reparameterize import Mixture
from slm.config import Config, DecodingConfig
from slm.errors import BackboneError, ConfigError, StoreError, TaskError
from slm.exchange import MergedTasks, Tasks, export_tasks, find_task, merge_tasks
from slm.extractor import Extractor, words_of
from slm.fitting import fitting_extractor, settled
from slm.knowledge import CurrentKnowledge, Knowledge, KnowledgeReader, Supply, shares_of
from slm.reading import SILENCE, Writer, explanation_of, read_labels, read_words
from slm.retrieval.features import first_bent_block
from slm.retrieval.retriever import Reread, Retrieved, Retriever
from slm.store import Manifest, Store, TaskRecord

if TYPE_CHECKING:
    from slm.evaluation.matrix import Evaluation
    from slm.learning.adopt import ImportReport
    from slm.learning.learner import LearningReport
    from slm.tasks import Stream, Task


class ScalableLM:
    """A frozen backbone and everything it has been taught.

    Made by :meth:`create` and :meth:`open`. One model may be asked from several threads; they take turns.
    """

    def __init__(
        self, store: Store, backbone: Backbone, config: Config, extractor: Extractor | None = None
    ) -> None:
        self.store = store
        self.backbone = backbone
        self.config = config
        self.extractor = extractor or Extractor(backbone, config.retrieval)
        first = first_bent_block(config.retrieval, backbone.num_layers)
        self.targets = tuple(backbone.targets(config.increments.targets, first))
        self.supply = Supply(store, config.pool, backbone.device)
        retrieval = config.retrieval.settled(has_words=backbone.kind is not BackboneKind.ENCODER)
        self.reader = KnowledgeReader(store, retrieval, backbone.device, backbone.dtype)
        self._merged: MergedTasks | None = None
        self._current = CurrentKnowledge(self.reader)

    @classmethod
    def create(
        cls, path: str | Path, backbone: str | Backbone = "minilm", config: Config | None = None
    ) -> ScalableLM:
        """Make an empty store in a new or empty folder and open it.

        Args:
            path: the store's folder.
            backbone: alias, folder, ``.gguf`` file or hub id, or a backbone loaded before.
            config: settings of the store; they stay with it. How a backbone was loaded before stays with it
                too, and is not said once more.

        Raises:
            BackboneError: the backbone cannot be loaded or re-parameterized, or something is merged into it.
            ConfigError: the settings do not fit the backbone or this machine.
            StoreError: the folder is not empty or cannot be written.
        """
        config, path = config or Config(), Store.check_place(path)
        loaded = load_backbone(backbone, config.backbone) if isinstance(backbone, str) else backbone
        config = settled(config, loaded)
        # Refuse misfits before anything is written.
        extractor, background = fitting_extractor(config, loaded), None
        if config.retrieval.form == "gaussian" and config.retrieval.has_background:
            with loaded.lock:
                if loaded.merged is not None:
                    raise BackboneError(
                        f"a task is merged into backbone {loaded.source!r}: unmerge it before making a store"
                    )
                background = extractor.background()
        manifest = Manifest(lasting_source(loaded.source), loaded.fingerprint, config.as_dict())
        return cls(Store.create(path, manifest, background), loaded, config, extractor)

    @classmethod
    def open(cls, path: str | Path, backbone: str | Backbone | None = None) -> ScalableLM:
        """Open a store, with the backbone it names or another copy of the same one.

        Raises:
            StoreError: no store is there, it is damaged, or it was made with another backbone, or with one
                that makes other rows of prompts.
            BackboneError: the backbone cannot be loaded.
        """
        store = Store.open(path)
        config = Config.from_mapping(store.manifest.config)
        wanted = backbone if backbone is not None else store.manifest.backbone_source
        loaded = load_backbone(wanted, config.backbone) if isinstance(wanted, str) else wanted
        if loaded.fingerprint != store.manifest.backbone_fingerprint:
            kept = config.backbone.quantization
            made = "" if kept == "none" else f", quantization {kept}"
            got = f", quantised by {loaded.quantization}" if loaded.quantization else ""
            raise StoreError(
                f"store {path} was made with backbone {store.manifest.backbone_source!r} (fingerprint "
                f"{store.manifest.backbone_fingerprint[:12]}{made}), got {loaded.source!r} "
                f"({loaded.fingerprint[:12]}{got}): open it with the backbone it was made with"
            )
        if misreadings := loaded.misreadings(config.backbone):
            raise StoreError(
                f"store {path} was made with {', '.join(misreadings)}, as {loaded.source!r} was loaded: load "
                "it with the store's settings, or give its name"
            )
        return cls(store, loaded, config)

    @property
    def tasks(self) -> tuple[TaskRecord, ...]:
        """The tasks this model answers from, in learning order."""
        return self.knowledge.records

    @property
    def knowledge(self) -> Knowledge:
        """What this model answers from now: its tasks, and the retriever that decides among them."""
        return self._current.newest()

    @property
    def _nameable(self) -> Sequence[TaskRecord] | None:
        """The tasks that may be named to this model; None for all in the store."""
        return self._current.held.records if self._current.is_pinned else None

    def learn(self, task: Task, **settings: Any) -> LearningReport:
        """Teach one task: prepare, fine-tune, commit (method section 4).

        Args:
            task: what to learn.
            **settings: fields of :class:`slm.config.LearningConfig` that differ from the store's defaults.

        Raises:
            TaskError: the name is taken.
            DataError: a row cannot be used.
            LearningError: training failed; nothing was stored.
        """
        from slm.learning import learn_task

        with self._frozen("learn"):
            return learn_task(self, task, **settings)

    def evaluate(self, stream: Stream, **options: Any) -> Evaluation:
        """Accuracy matrix and metrics of method section 5; see :func:`slm.evaluation.evaluate_stream`."""
        from slm.evaluation import evaluate_stream

        self._expect_frozen("evaluate")
        return evaluate_stream(self, stream, **options)

    def merge(self, tasks: Tasks) -> None:
        """Bake one task, or a fixed mixture of tasks, into the backbone's weights, until :meth:`unmerge`.

        Meanwhile every question is answered from it at the frozen backbone's speed: nothing is retrieved and
        no row abstains. What needs the frozen weights (learning, explaining, evaluating) is refused, and so
        is every other model on the same backbone.

        Args:
            tasks: a name, several names in equal parts, or {name: weight} with weights of sum 1.

        Raises:
            TaskError: a task is unknown or cannot be merged.
            ConfigError: the weights are not above 0 with the sum 1.
            BackboneError: something is merged already, or a layer's weights cannot be merged into.
        """
        with self._frozen("merge"):
            self._merged = merge_tasks(self.backbone, self.store, tasks, self._nameable)

    def unmerge(self) -> None:
        """Put the frozen weights back, to the bit; nothing happens when nothing is merged."""
        with self.backbone.lock:
            if self._merged is not None:
                unmerge(self.backbone)
            self._merged = None

    def export(self, tasks: Tasks, folder: str | Path, *, is_merged: bool = False) -> list[str]:
        """Write tasks for other programs, as a PEFT adapter or, merged, as a transformers checkpoint.

        Args:
            tasks: a name, several names in equal parts, or {name: weight} with weights of sum 1.
            folder: new or empty; links are followed.
            is_merged: whole weights with the tasks baked in, tokenizer included.

        Returns:
            The names of the files written; ``docs/adapters.md`` says what they are.

        Raises:
            TaskError: a task is unknown or cannot be exported.
            ConfigError: the weights are not above 0 with the sum 1.
            StoreError: the folder is not empty or cannot be written.
            BackboneError: something is merged, or a layer's weights cannot be merged into.
        """
        with self._frozen("export"):
            return export_tasks(self.backbone, self.store, tasks, folder, is_merged, self._nameable)

    def import_adapter(self, folder: str | Path, task: Task, **options: Any) -> ImportReport:
        """Take a LoRA or AdaLoRA adapter trained elsewhere as the knowledge of a task, without training.

        Args:
            folder: a PEFT adapter folder.
            task: its name, and examples its keys are computed from.
            **options: see :func:`slm.learning.adopt.import_adapter`.

        Raises:
            TaskError: the name is taken, or the backbone cannot answer this kind of task.
            StoreError: a file of the adapter cannot be read; the store is as it was.
            IncrementError: it is no LoRA adapter, does not fit, or its head cannot be used.
            DataError: an example cannot be used.
        """
        from slm.learning import import_adapter

        with self._frozen("import an adapter"):
            return import_adapter(self, Path(folder), task, **options)

    def forget(self, name: str) -> None:
        """Remove a task; what is left answers as if it had never been taught.

        Raises:
            TaskError: there is no such task.
        """
        with self.backbone.lock:
            if self._merged and any(record.name == name for record in self._merged.mixture.records):
                raise TaskError(f"task {name!r} is merged into the weights: unmerge before forgetting it")
            self.supply.drop(self.store.forget(name))
            self._current.newest()

    def restricted(self, names: str | Sequence[str], *, is_abstaining: bool | None = None) -> ScalableLM:
        """A model of the same backbone and store that knows only some of the tasks, and stays so.

        With one name and no abstention it is the oracle: every row is given that task's knowledge.

        Args:
            names: of the tasks; one name is one task.
            is_abstaining: differs from the store's settings where it is given.

        Raises:
            TaskError: a name is unknown.
        """
        wanted = [names] if isinstance(names, str) else list(names)
        if self._current.is_pinned:
            for name in wanted:
                find_task(self.store, name, self._nameable)
        other = object.__new__(ScalableLM)
        other.__dict__.update(self.__dict__)
        if is_abstaining is not None:
            retrieval = replace(self.config.retrieval, is_abstaining=is_abstaining)
            other.config = replace(self.config, retrieval=retrieval)
        other._merged = None
        own = self.reader.named(wanted, is_abstaining=other.config.retrieval.is_abstaining)
        other._current = CurrentKnowledge(self.reader, own)
        return other

    def ask(
        self,
        questions: str | Sequence[Question],
        *,
        max_new_tokens: int = 128,
        batch_size: int = 32,
        is_truncating: bool = False,
        decoding: DecodingConfig | None = None,
    ) -> list[Answer]:
        """Answer questions of any task without being told which.

        Args:
            questions: texts, or conversations as lists of {"role", "content"} or of
                :class:`slm.tasks.Message`; one text is one question.
            max_new_tokens: longest generated answer.
            batch_size: rows computed together; it changes the speed, not the answers.
            is_truncating: cut the middle out of an over-long question instead of refusing it, so that the
                window has room for an answer behind it.
            decoding: beams or samples for free text; the likeliest token at every step by default.

        Returns:
            One answer per question, in order.

        Raises:
            DataError: a question is empty or too long; the message gives its number.
            ConfigError: the answer would not fit into the backbone's window, or ``batch_size`` is below 1.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        prompts = prompts_of(questions)
        rows = self.backbone.question_rows(
            prompts, is_truncating=is_truncating, max_new_tokens=max_new_tokens
        )
        self.backbone.check_room(rows, max_new_tokens)
        write = partial(self._write, max_new_tokens, decoding)

        def answer(chosen: Sequence[int]) -> list[Answer]:
            batch = self.backbone.batch([rows[i] for i in chosen])
            texts = [words_of(prompts[i]) for i in chosen]
            return self._current.renewing(partial(self._answer, batch=batch, texts=texts, write=write))

        answers: dict[int, Answer] = {}
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
        with self.backbone.lock, torch.inference_mode(), contextlib.ExitStack() as stack:
            self._expect_own_weights()
            self._current.newest()
            stack.callback(self.backbone.reparameterizer.rest)
            starts = range(0, len(order), batch_size)
            for start in tqdm(starts, "answering", leave=False, delay=2, disable=None):
                chosen = order[start : start + batch_size]
                answers |= zip(chosen, in_parts(chosen, answer), strict=True)
        return [answers[i] for i in range(len(rows))]

    def explain(self, question: Question, *, is_truncating: bool = False) -> Explanation:
        """DTKR's whole decision for one question: distances, thresholds, weights.

        Raises:
            DataError: the question is empty or too long.
        """
        (prompt,) = prompts_of([question])
        with self._frozen("explain"):
            self._current.newest()
            queries = self.queries([prompt], is_truncating=is_truncating)

            def decide(knowledge: Knowledge) -> Explanation:
                text, retriever = words_of(prompt), knowledge.retriever
                if retriever is None:
                    return Explanation(text, (), True)
                retrieved, seen = retriever(queries), retriever.task_distances(queries)
                return explanation_of(text, knowledge.records, retrieved, seen)

            return self._current.renewing(decide)

    def retrieve(
        self,
        questions: str | Sequence[Question],
        *,
        queries: Tensor | None = None,
        is_truncating: bool = False,
    ) -> Retrieved | None:
        """DTKR alone, for many questions; None while the model knows no task.

        Args:
            questions: texts or conversations; one text is one question.
            queries: of these questions, (B, C), where :meth:`queries` read them before; None reads them now.
            is_truncating: cut the middle out of an over-long question instead of refusing it.

        Raises:
            DataError: a question is empty or too long.
            BackboneError: something is merged into the backbone.
        """

        def decide(knowledge: Knowledge) -> Retrieved | None:
            if knowledge.retriever is None:
                return None
            return self.decide(knowledge.retriever, questions, queries=queries, is_truncating=is_truncating)

        with self.backbone.lock:
            self._current.newest()
            return self._current.renewing(decide)

    def decide(
        self,
        retriever: Retriever,
        questions: str | Sequence[Question],
        *,
        queries: Tensor | None = None,
        is_truncating: bool = False,
    ) -> Retrieved:
        """What one retriever, of a snapshot of this model's knowledge, decides for some questions.

        Args and errors are those of :meth:`retrieve`.
        """
        prompts = prompts_of(questions)

        def read(some: Sequence[Prompt]) -> Tensor:
            rows = self.backbone.question_rows(some, is_truncating=is_truncating)
            return self.extractor(some, rows)

        with self._frozen("retrieve"):
            return retriever(read(prompts) if queries is None else queries, lambda i: read([prompts[i]])[0])

    def queries(
        self, questions: str | Sequence[Question], *, is_truncating: bool = False, batch_size: int = 32
    ) -> Tensor:
        """Queries of some questions, (B, C) float32 on the CPU, from the frozen extractor alone."""
        prompts = prompts_of(questions)
        rows = self.backbone.question_rows(prompts, is_truncating=is_truncating)
        with self._frozen("retrieve"):
            return self.extractor(prompts, rows, batch_size)

    def _expect_own_weights(self) -> None:
        if self.backbone.merged is not (self._merged.merge if self._merged else None):
            raise BackboneError(
                f"another model has merged a task into backbone {self.backbone.source!r}: unmerge it there"
            )

    def _expect_frozen(self, what: str) -> None:
        self._expect_own_weights()
        if self._merged is not None:
            names = ", ".join(record.name for record in self._merged.mixture.records)
            raise BackboneError(
                f"{names} is merged into the weights, and to {what} takes the frozen ones: unmerge first"
            )

    @contextlib.contextmanager
    def _frozen(self, what: str) -> Iterator[None]:
        """Hold the backbone within the block, and only while nothing is merged into it."""
        with self.backbone.lock:
            self._expect_frozen(what)
            yield

    def mixture(self, retrieved: Retrieved) -> Mixture:
        """Turn kept keys into increments: what crosses from DTKR to JARe."""
        return self.supply.mixture(shares_of(retrieved, self._current.held.records))

    @contextlib.contextmanager
    def _adapting(
        self, knowledge: Knowledge, batch: Batch, texts: Sequence[str]
    ) -> Iterator[list[Retrieved]]:
        """Within the block, the backbone retrieves for this batch and bends to it.

        Yields a list that holds the decision as soon as it is taken: at once, or, where the query is read
        inside the forward pass, after that pass.
        """
        decided: list[Retrieved] = []

        def decide(queries: Tensor, reread: Reread) -> Mixture:
            assert knowledge.retriever is not None
            decided.append(knowledge.retriever(queries, reread))
            return self.supply.mixture(shares_of(decided[0], knowledge.records))

        self.backbone.reparameterizer.release()
        if self._merged is not None:
            yield [self._merged.mixture.retrieved(len(texts))]
        elif knowledge.retriever is None:
            yield decided
        else:
            with self.extractor.bending(batch, texts, decide, is_two_pass=knowledge.needs_two_passes):
                yield decided

    def _write(
        self, max_new_tokens: int, decoding: DecodingConfig | None, start: Prefill, rows: Sequence[int]
    ) -> list[list[Generated]]:
        return generate(self.backbone, start, rows, max_new_tokens, decoding)

    def _answer(
        self, knowledge: Knowledge, batch: Batch, texts: Sequence[str], write: Writer
    ) -> list[Answer]:
        records = self._merged.mixture.records if self._merged else knowledge.records
        with self._adapting(knowledge, batch, texts) as decided:
            if self.backbone.kind is BackboneKind.ENCODER:
                if not records:
                    return [SILENCE] * len(texts)
                return read_labels(self.backbone.pooled(batch), decided[0], records, self.supply.head)
            start = prefill(self.backbone, batch)
            retrieved = decided[0] if decided else None
            return read_words(self.backbone, start, retrieved, records, write)
