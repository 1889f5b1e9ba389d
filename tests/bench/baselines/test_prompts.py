"""Soft prompts against the words they could be; the pool's choice; earlier prompts that stay."""

from __future__ import annotations

import pytest
import torch

from slm.backbone.backbone import BackboneKind
from slm.backbone.prompts import Row
from slm.bench.baselines import rival
from slm.bench.baselines.soft_prompt import prompted_loss, prompted_pooled, prompted_prefill
from slm.errors import ConfigError, TaskError
from slm.learning.objectives import answer_objective
from tests.bench.baselines.conftest import colours, sizes, texts_of

WORDS = (7, 8, 9)


def rows_with_words(backbone, is_answered):
    """Two rows of unequal length, and the same ones with three words more at the front."""
    target = "yes" if is_answered else None
    rows = [
        backbone.row(text, target, is_truncating=True, where="row")
        for text in ("a red thing", "a thing that is rather blue today")
    ]
    longer = [Row(WORDS + row.prompt, (row.content[0] + 3, row.content[1] + 3), row.target) for row in rows]
    return backbone.batch(rows), backbone.batch(longer)


def as_prompts(backbone, batch):
    table = backbone.model.get_input_embeddings().weight
    return table[torch.tensor(WORDS)].expand(len(batch.ids), -1, -1)


@torch.no_grad()
def test_prompts_that_are_words_encode_as_these_words_do(tiny):
    backbone = tiny("BERT")
    plain, longer = rows_with_words(backbone, False)
    found = prompted_pooled(backbone, plain, as_prompts(backbone, plain))
    torch.testing.assert_close(found, backbone.pooled(longer), atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["LLaMA", "T5"])
def test_prompts_that_are_words_write_as_these_words_do(family, tiny):
    from slm.backbone.decode import prefill, score_labels
    from slm.backbone.generate import generate

    backbone = tiny(family)
    plain, longer = rows_with_words(backbone, True)
    loss = prompted_loss(backbone, plain, as_prompts(backbone, plain))
    torch.testing.assert_close(loss, answer_objective(backbone, longer).loss, atol=1e-5, rtol=1e-4)

    asked, asked_longer = rows_with_words(backbone, False)
    start = prompted_prefill(backbone, asked, as_prompts(backbone, asked))
    words = prefill(backbone, asked_longer)
    torch.testing.assert_close(start.logits, words.logits, atol=1e-4, rtol=1e-4)
    texts = [[g.text for g in row] for row in generate(backbone, start, [0, 1], 5)]
    assert texts == [[g.text for g in row] for row in generate(backbone, words, [0, 1], 5)]
    labels = [["red thing", "blue"]] * 2
    for one, two in zip(
        score_labels(backbone, start, [0, 1], labels),
        score_labels(backbone, words, [0, 1], labels),
        strict=True,
    ):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
    assert backbone.kind is not BackboneKind.ENCODER


def test_the_pool_takes_the_prompts_of_the_nearest_keys_and_pulls_these_keys_alone(setup):
    method = rival("l2p")(setup("BERT", {"pool_size": 6.0, "num_chosen": 2.0, "prompt_length": 3.0}))
    pool = method.pool
    batch, _ = rows_with_words(method.setup.backbone, False)
    queries = pool.queries(batch)
    prompts, pull = pool.choose(batch)
    assert prompts.shape == (2, 6, 32)
    lost, used = 0.0, set()
    for row, query in enumerate(queries):
        cosines = [float(torch.cosine_similarity(query, key, dim=0)) for key in pool.keys.detach()]
        best = sorted(range(6), key=lambda n: -cosines[n])[:2]
        assert torch.equal(prompts[row], torch.cat([pool.prompts[n] for n in best]))
        lost += sum(1 - cosines[n] for n in best)
        used |= set(best)
    assert float(pull.detach()) == pytest.approx(0.5 * lost / 2, rel=1e-4)
    pull.backward()
    moved = {n for n in range(6) if float(pool.keys.grad[n].abs().sum()) > 0}
    assert moved == used
    assert len(used) < 6


def test_prompts_and_keys_of_the_pool_learn_together(setup):
    method = rival("l2p")(setup("BERT"))
    before = {name: value.clone() for name, value in method.pool.state_dict().items()}
    method.learn(colours())
    for name in ("prompts", "keys"):
        assert not torch.equal(method.pool.state_dict()[name], before[name])


def test_a_new_progressive_prompt_goes_before_the_earlier_ones_which_stay_as_they_were(setup):
    method = rival("progressive-prompts")(setup("BERT", {"prompt_length": 2.0}))
    method.learn(colours())
    first = method.learned["colours"].module
    kept = {name: value.clone() for name, value in first.state_dict().items()}
    questions = texts_of(colours())
    before = method.ask(questions, ["colours"] * len(questions))
    method.learn(sizes())
    second = method.learned["sizes"].module
    assert torch.equal(second.prompts(), torch.cat([second.own, first.own]))
    assert all(torch.equal(value, kept[name]) for name, value in first.state_dict().items())
    assert method.ask(questions, ["colours"] * len(questions)) == before


def test_a_method_that_needs_the_task_says_so(setup):
    for name in ("progressive-prompts", "oracle", "slm-cosine-voting"):
        settings = {"num_groups": 4.0} if name.startswith("slm") else None
        with pytest.raises(TaskError, match=f"{name} has to be told the task of every question: give tasks"):
            rival(name)(setup("BERT", settings)).ask(["a question"])


def test_prompts_that_leave_no_room_for_a_row_are_refused(setup):
    with pytest.raises(ConfigError, match="100 prompt tokens before rows of up to 96 tokens do not fit"):
        rival("l2p")(setup("BERT", {"prompt_length": 20.0}))
