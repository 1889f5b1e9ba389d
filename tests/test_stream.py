"""Real tasks: told apart by their texts alone, one row at a time."""

from __future__ import annotations

import pytest
import torch

from slm.config import RetrievalConfig
from slm.model import ScalableLM
from slm.retrieval.keys import learn_keys
from slm.retrieval.retriever import Retriever
from slm.tasks import Stream
from tests.conftest import SHARED_DATA, config

NAMES = ("agnews", "imdb", "boolq", "dbpedia", "qqp")


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"the shared data is not at {SHARED_DATA}")
def test_five_real_tasks_are_told_apart_and_outsiders_are_farther_away(tmp_path, minilm):
    stream = Stream.load(SHARED_DATA, [*NAMES, "text2sql"], limit=150, test_limit=40)
    model = ScalableLM.create(tmp_path / "store", minilm, config(1))
    known = stream.order(NAMES)
    keys = []
    for task in known:
        queries = model.queries([e.prompt for e in task.examples], is_truncating=True)
        keys.append(learn_keys(queries, torch.zeros(len(queries), dtype=torch.long)))
    retriever = Retriever(keys, sum(k.scatter.double() for k in keys), RetrievalConfig())

    wrong = refused = total = 0
    for number, task in enumerate(known):
        found = retriever(model.queries([e.prompt for e in task.test], is_truncating=True))
        wrong += int((found.owners[found.nearest] != number).sum())
        refused += int(found.is_abstained.sum())
        total += len(task.test)
    outside = retriever(model.queries([e.prompt_text for e in stream["text2sql"].test], is_truncating=True))
    assert wrong <= 0.02 * total
    assert refused <= 0.06 * total
    assert float(outside.is_abstained.float().mean()) >= 0.8
