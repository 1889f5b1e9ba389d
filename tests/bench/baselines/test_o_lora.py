"""O-LoRA: the overlap it penalises, and the sum it answers with."""

from __future__ import annotations

import pytest
import torch

from slm.bench.baselines import rival
from tests.bench.baselines.conftest import colours, sizes


def taught(setup, strength=0.5, num_tasks=2):
    method = rival("o-lora")(setup("BERT", {"strength": strength, "learning_rate": 1e-2}, num_epochs=2))
    for task in (colours(), sizes())[:num_tasks]:
        method.learn(task)
    return method


def test_the_overlap_is_the_sum_of_squares_of_every_product_of_rows(setup):
    knowledge = taught(setup).knowledge
    knowledge.add_one(seed=7)
    total, A = 0.0, lambda name: knowledge.newest(name).A.detach()
    for name in knowledge.names:
        for old in knowledge.earlier[name][0]:  # the rows of both earlier A's
            for new in A(name):
                total += float(old @ new) ** 2
    assert len(knowledge.earlier[knowledge.names[0]][0]) == 4
    assert float(knowledge.overlap().detach()) == pytest.approx(total, rel=1e-5)


def test_a_strong_penalty_leaves_less_overlap(setup):
    held, free = (taught(setup, strength).knowledge.overlap().detach() for strength in (100.0, 0.0))
    assert float(held) < 0.5 * float(free)


def test_earlier_increments_stay_as_they_were_and_a_fresh_one_changes_nothing(setup):
    method = taught(setup, num_tasks=1)
    knowledge = method.knowledge
    names = knowledge.names
    learned = {name: knowledge.newest(name).B.detach().clone() for name in names}
    questions = [example.prompt for example in colours().test]
    before = method.ask(questions)
    knowledge.add_one(seed=7)
    for one, two in zip(before, method.ask(questions), strict=True):
        assert one.text == two.text
        assert one.confidence == pytest.approx(two.confidence, abs=1e-5)
    method.num_tasks = 0  # the increment is there already
    method.learn(sizes())
    for name in names:
        assert torch.equal(knowledge.earlier[name][1], learned[name])
        assert float(knowledge.newest(name).B.detach().abs().max()) > 0


def test_a_layer_answers_with_the_sum_of_all_increments(setup):
    method = taught(setup)
    knowledge, backbone = method.knowledge, method.setup.backbone
    name = knowledge.names[0]
    layer, scale = backbone.reparameterizer.layers[name], knowledge.newest(name).scale
    x = torch.randn(2, 3, layer.shape[1], generator=torch.Generator().manual_seed(0))
    knowledge.bind()
    found = layer(x)
    backbone.reparameterizer.release()
    A, B = knowledge.earlier[name]
    newest = knowledge.newest(name)
    change = scale * (B @ A + newest.B @ newest.A)
    torch.testing.assert_close(found, layer(x) + x @ change.T)
