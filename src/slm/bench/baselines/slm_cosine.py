"""The paper's form: learned cosine keys, four increments per task mixed by similarity; and its batch voting.

:class:`SlmCosine` retrieves for each row by itself. :class:`SlmCosineVoting` has the very same knowledge
but averages the similarities over a batch and gives all its rows the same mixture, as the paper's release
does. That needs test batches of one task each, which gives the task boundaries away: an ablation, no rival.

Both keep slm's own extractor, the inner layers of the backbone, and bend the layers that slm bends: they are
the paper's keys, K and mixture on slm's queries. The paper's own extractor is Sentence-BERT, and it bends
the attention outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from slm.answer import Answer
from slm.backbone.backbone import BackboneKind
from slm.backbone.decode import Prefill, prefill
from slm.backbone.generate import Generated, generate
from slm.backbone.prompts import Batch, Prompt
from slm.backbone.reparameterize import Mixture
from slm.bench.baselines.isolated import IsolatedRival
from slm.bench.baselines.rows import BATCH_SIZE, answer_all
from slm.config import CosineConfig, RetrievalConfig
from slm.errors import TaskError
from slm.reading import read_labels, read_words
from slm.retrieval.cosine import similarities
from slm.retrieval.retriever import Retrieved
from slm.store import TaskRecord


class SlmCosine(IsolatedRival):
    """The paper's keys and mixture, row by row: 6 groups, 4 keys a task, K = 4 (BERT) or 2 (LLaMA)."""

    name = "slm-cosine"
    title = "paper's form, row by row"
    defaults = {"num_groups": float(CosineConfig().num_groups), "min_steps": float(CosineConfig().min_steps)}

    def retrieval(self, config: RetrievalConfig) -> RetrievalConfig:
        """The paper's settings; it drops no small weight and never abstains."""
        is_encoder = self.setup.backbone.kind is BackboneKind.ENCODER
        return dataclasses.replace(
            config,
            form="cosine",
            cosine=CosineConfig(
                num_groups=int(self.settings["num_groups"]), min_steps=int(self.settings["min_steps"])
            ),
            keys_per_task=1,
            prior="uniform",
            top_k=4 if is_encoder else 2,
            min_weight=0.0,
            temperature=None,
            is_abstaining=False,
        )


class SlmCosineVoting(SlmCosine):
    """One mixture for a whole batch of one task."""

    name = "slm-cosine-voting"
    title = "paper's form, batch voting (task boundaries given)"
    needs_task_id = True
    defaults = {**SlmCosine.defaults, "batch_size": float(BATCH_SIZE)}

    def ask(self, questions: Sequence[Prompt], tasks: Sequence[str] | None = None) -> list[Answer]:
        """Answers in batches of one task, each batch with the mixture that its rows vote for."""
        if tasks is None:
            raise TaskError(f"{self.name} has to be told the task of every question: give tasks")
        size = int(self.settings["batch_size"])
        answers: dict[int, Answer] = {}
        for name in dict.fromkeys(tasks):
            own = [i for i, task in enumerate(tasks) if task == name]
            for start in range(0, len(own), size):
                chosen = own[start : start + size]
                found = self._answer([questions[i] for i in chosen])
                answers.update(zip(chosen, found, strict=True))
        return [answers[i] for i in range(len(questions))]

    def ask_again(self, questions: Sequence[Prompt], tasks: Sequence[str] | None = None) -> list[Answer]:
        """The same: what a row gets depends on the batch it votes in."""
        return self.ask(questions, tasks)

    def nearest(self, questions: Sequence[Prompt]) -> list[str] | None:
        """None: rows of unknown tasks cannot vote."""
        return None

    def vote(self, questions: Sequence[Prompt]) -> Retrieved:
        """The decision of a batch: similarities averaged over its rows, the same K keys for all."""
        retriever = self.model.knowledge.retriever
        assert retriever is not None, "a task is learned first"
        config, scorer = retriever.config, retriever.scorer
        queries = self.model.queries(questions, is_truncating=True)
        shared = similarities(queries, scorer.keys, config.cosine.num_groups).mean(0, keepdim=True)
        best = shared.topk(min(config.top_k, shared.shape[1]), dim=1)
        keys, distances = best.indices.expand(len(queries), -1), 1 - best.values
        weights = scorer.weigh(distances, config.settled_temperature).float().expand(len(queries), -1)
        return Retrieved(
            tasks=scorer.tasks[keys],
            increments=scorer.increments[keys],
            weights=weights,
            candidates=keys,
            posterior=weights,
            distances=distances.float().expand(len(queries), -1),
            thresholds=torch.full((len(queries),), torch.inf),
            margins=torch.full((len(queries),), torch.inf),
            owners=scorer.tasks,
            is_contested=torch.zeros(len(queries), dtype=torch.bool),
            is_abstained=torch.zeros(len(queries), dtype=torch.bool),
        )

    def _answer(self, questions: Sequence[Prompt]) -> list[Answer]:
        backbone, limit = self.setup.backbone, self.setup.max_new_tokens
        records, decided = self.model.tasks, self.vote(questions)

        def write(start: Prefill, rows: Sequence[int]) -> list[list[Generated]]:
            return generate(backbone, start, rows, limit)

        def answer(batch: Batch) -> list[Answer]:
            # All rows of the batch have one mixture, so their order does not matter.
            backbone.reparameterizer.bind(self._mixture(decided))
            try:
                if backbone.kind is BackboneKind.ENCODER:
                    return read_labels(backbone.pooled(batch), decided, records, self._head)
                return read_words(backbone, prefill(backbone, batch), decided, records, write)
            finally:
                backbone.reparameterizer.release()

        return answer_all(backbone, questions, answer, batch_size=len(questions))

    def _mixture(self, decided: Retrieved) -> Mixture:
        """The same increments and weights for every row."""
        pairs = zip(decided.tasks[0].tolist(), decided.increments[0].tolist(), strict=True)
        records = self.model.tasks
        increments = [self.model.store.increment(records[task], index) for task, index in pairs]
        slots = torch.arange(len(increments)).expand(len(decided.tasks), -1)
        return Mixture(increments, slots, decided.weights)

    def _head(self, record: TaskRecord) -> dict[str, torch.Tensor]:
        return self.model.store.head(record) or {}
