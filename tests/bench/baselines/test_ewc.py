"""EWC: its Fisher information, its parabola, and what strength 0 leaves of it."""

from __future__ import annotations

import pytest
import torch

from slm.bench.baselines import rival
from slm.bench.baselines.ewc import fisher
from slm.bench.baselines.rows import training_rows
from tests.bench.baselines.conftest import colours, sizes


def taught(setup, name, settings=None):
    method = rival(name)(setup("BERT", settings, num_epochs=2))
    for task in (colours(), sizes()):
        method.learn(task)
    return method


def test_strength_0_is_sequential_lora_to_the_bit_and_a_large_strength_is_not(setup):
    plain = dict(taught(setup, "sequential-lora").knowledge.named_parameters())
    free = dict(taught(setup, "ewc", {"strength": 0.0, "masks_labels": 0.0}).knowledge.named_parameters())
    held = dict(taught(setup, "ewc", {"strength": 1e6, "masks_labels": 0.0}).knowledge.named_parameters())
    assert all(torch.equal(plain[name], free[name]) for name in plain)
    assert not all(torch.allclose(plain[name], held[name], atol=1e-4) for name in plain)


def test_the_fisher_information_is_the_mean_squared_gradient_of_each_row_by_itself(setup):
    method = rival("ewc")(setup("BERT"))
    method.learn(colours())
    knowledge, backbone = method.knowledge, method.setup.backbone
    rows, _ = training_rows(backbone, colours(), knowledge.labels, method.config)
    found = fisher(knowledge, rows[:3])
    bias = knowledge.head.bias
    by_hand = torch.zeros_like(bias)
    for row in rows[:3]:
        knowledge.bind()
        chances = knowledge.head(backbone.pooled(backbone.batch([row.row])))[0].softmax(-1)
        backbone.reparameterizer.release()
        by_hand += (chances - torch.nn.functional.one_hot(torch.tensor(row.label), len(bias))) ** 2
    torch.testing.assert_close(found["head.bias"], by_hand.detach() / 3)


def test_labels_that_a_task_could_not_answer_with_are_of_no_importance_to_it(setup):
    for masks, is_open in ((1.0, False), (0.0, True)):
        method = rival("ewc")(setup("BERT", {"masks_labels": masks}))
        method.learn(colours())
        before = method.precision["head.bias"].clone()
        method.learn(sizes())
        gained = method.precision["head.bias"][: len(before)] - before
        assert bool((gained > 0).any()) == is_open
        assert bool((method.precision["head.bias"][len(before) :] > 0).all())
        assert method.knowledge.head.open_labels is None


def test_the_one_parabola_is_the_sum_of_the_tasks_up_to_a_constant(setup):
    method = rival("ewc")(setup("BERT", {"strength": 3.0}))
    anchors, informations = [], []
    for task in (colours(), sizes()):
        before = {name: value.clone() for name, value in method.precision.items()}
        method.learn(task)
        anchors.append({n: p.detach().clone() for n, p in method.knowledge.named_parameters()})
        informations.append(
            {n: v - _padded(before.get(n, torch.zeros_like(v)), v) for n, v in method.precision.items()}
        )
    method.before(colours())

    @torch.no_grad()
    def slow():
        total = 0.0
        for anchor, information in zip(anchors, informations, strict=True):
            for name, parameter in method.knowledge.named_parameters():
                total += float(
                    (
                        _padded(information[name], parameter)
                        * (parameter - _padded(anchor[name], parameter)) ** 2
                    ).sum()
                )
        return 3.0 / 2 * total

    first = slow() - float(method.penalty().detach())
    with torch.no_grad():
        for parameter in method.knowledge.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    assert slow() - float(method.penalty().detach()) == pytest.approx(first, rel=1e-3, abs=1e-3)
    assert slow() > 10 * abs(first)


def _padded(values, like):
    padded = torch.zeros(like.shape)
    padded[tuple(slice(0, n) for n in values.shape)] = values
    return padded
