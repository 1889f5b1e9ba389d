"""JARe: the layer against a loop that forms every weight change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slm.backbone.reparameterize import LearningBinding, Mixture, Reparameterizer
from slm.backbone.targets import find_blocks
from slm.errors import BackboneError, IncrementError
from slm.increments.increment import Increment, LowRankPair

NAMES = ("0", "2")


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))


def random_increment(rank: int, seed: int, names=NAMES) -> Increment:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"0": (5, 7), "2": (7, 4)}
    pairs = {
        name: LowRankPair(
            torch.randn(rank, sizes[name][0], generator=generator),
            torch.randn(sizes[name][1], rank, generator=generator),
        )
        for name in names
    }
    return Increment(pairs, rank, alpha=3.0)


def by_hand(net: nn.Sequential, x: torch.Tensor, mixture: Mixture) -> torch.Tensor:
    """y_b = (W + Σ_k w_bk s_k B_k A_k) x_b + bias, one row and one layer at a time."""
    rows = []
    for b in range(x.shape[0]):
        h = x[b]
        for i, module in enumerate(net):
            if not hasattr(module, "weight"):
                h = module(h)
                continue
            W = module.weight.clone()
            for slot, weight in zip(mixture.slots[b].tolist(), mixture.weights[b].tolist(), strict=True):
                increment = mixture.increments[slot]
                if weight and str(i) in increment.pairs:
                    pair = increment.pairs[str(i)]
                    W = W + weight * increment.scale * pair.B @ pair.A
            h = h @ W.T + module.bias
        rows.append(h)
    return torch.stack(rows)


@pytest.mark.parametrize("is_shared", [True, False])
def test_bent_layers_equal_forming_every_weight_change(is_shared):
    net = small_net()
    bound = Reparameterizer(net, NAMES)
    increments = [random_increment(2, 1), random_increment(3, 2), random_increment(1, 3, names=("2",))]
    slots = torch.tensor([[0, 1], [2, 0], [1, 1], [0, 2]])
    weights = torch.tensor([[0.7, 0.3], [0.5, 0.5], [1.0, 0.0], [0.0, 0.0]])
    if is_shared:
        slots, weights = slots[:1].expand(4, 2), weights[:1].expand(4, 2)
    mixture = Mixture(increments, slots, weights)
    x = torch.randn(4, 6, 5)
    bound.bind(mixture)
    torch.testing.assert_close(net(x), by_hand(net, x, mixture), atol=1e-5, rtol=1e-5)


def test_a_zero_increment_and_nothing_bound_equal_the_frozen_net_exactly():
    net = small_net()
    x = torch.randn(3, 6, 5)
    frozen = net(x)
    bound = Reparameterizer(net, NAMES)
    assert torch.equal(net(x), frozen)
    zero = {
        n: LowRankPair(torch.randn(2, i), torch.zeros(o, 2))
        for n, (i, o) in {"0": (5, 7), "2": (7, 4)}.items()
    }
    bound.bind(Mixture([Increment(zero, 2, 4.0)], torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)))
    assert torch.equal(net(x), frozen)
    bound.bind(Mixture([random_increment(2, 1)], torch.zeros(3, 1, dtype=torch.long), torch.zeros(3, 1)))
    assert torch.equal(net(x), frozen)
    bound.bind(Mixture([random_increment(2, 1)], torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)))
    assert not torch.equal(net(x), frozen)
    bound.release()
    assert torch.equal(net(x), frozen)


def test_an_abstaining_row_of_a_mixed_batch_is_exactly_the_frozen_one():
    net = small_net()
    x = torch.randn(2, 6, 5)
    frozen = net(x)
    bound = Reparameterizer(net, NAMES)
    bound.bind(
        Mixture([random_increment(2, 1)], torch.zeros(2, 1, dtype=torch.long), torch.tensor([[1.0], [0.0]]))
    )
    assert torch.equal(net(x)[1], frozen[1])
    assert not torch.equal(net(x)[0], frozen[0])


def test_selected_rows_keep_their_own_mixture():
    net = small_net()
    bound = Reparameterizer(net, NAMES)
    increments = [random_increment(2, 1), random_increment(2, 2)]
    bound.bind(Mixture(increments, torch.tensor([[0], [1], [0]]), torch.ones(3, 1)))
    x = torch.randn(3, 6, 5)
    whole = net(x)
    with bound.selected(torch.tensor([2, 1])):
        torch.testing.assert_close(net(x[[2, 1]]), whole[[2, 1]])
    torch.testing.assert_close(net(x), whole)


def test_a_batch_of_another_size_than_bound_is_refused():
    net = small_net()
    bound = Reparameterizer(net, NAMES)
    increments = [random_increment(2, 1), random_increment(2, 2)]
    bound.bind(Mixture(increments, torch.tensor([[0], [1]]), torch.ones(2, 1)))
    with pytest.raises(BackboneError, match=r"input of shape \(4, 6, 5\) while 2 rows are bound: give one"):
        net(torch.randn(4, 6, 5))


def test_an_increment_that_does_not_fit_is_refused_by_name():
    net = small_net()
    bound = Reparameterizer(net, ("0",))
    one = torch.zeros(1, 1, dtype=torch.long)
    with pytest.raises(IncrementError, match=r"changes 2, which is not re-parameterized in this backbone"):
        bound.bind(Mixture([random_increment(2, 1)], one, torch.ones(1, 1)))
    wrong = Increment({"0": LowRankPair(torch.randn(2, 6), torch.randn(7, 2))}, 2, 2.0)
    with pytest.raises(IncrementError, match=r"at 0 maps 6 to 7 features, the layer 5 to 7: it belongs to"):
        bound.bind(Mixture([wrong], one, torch.ones(1, 1)))


def test_a_module_that_is_not_linear_is_refused_by_name():
    with pytest.raises(BackboneError, match=r"^module 1 is a Tanh, not a linear layer"):
        Reparameterizer(small_net(), ("1",))


def test_a_new_increment_changes_nothing_and_only_it_gets_gradients():
    net = small_net().requires_grad_(False)
    x = torch.randn(3, 6, 5)
    frozen = net(x)
    bound = Reparameterizer(net, NAMES)
    seed = torch.Generator().manual_seed(0)
    learning = {n: LearningBinding(bound.layers[n].base, 2, 2.0, 0.0, seed) for n in NAMES}
    bound.bind_each(learning)
    assert torch.equal(net(x), frozen)
    net(x).sum().backward()
    assert all(p.grad is None for p in net.parameters())
    assert learning["0"].B.grad is not None
    assert float(learning["0"].B.grad.abs().sum()) > 0


def test_layers_are_found_by_structure_in_bert_and_llama(minilm, smollm2):
    assert len(find_blocks(minilm.model)[1]) == 6
    assert len(minilm.targets("all-linear", 0)) == 36
    assert minilm.targets("attention-output", 5) == ["encoder.layer.5.attention.output.dense"]
    outputs = smollm2.targets("attention-output", 28)
    assert outputs == ["model.layers.28.self_attn.o_proj", "model.layers.29.self_attn.o_proj"]
    with pytest.raises(BackboneError, match=r"no all-linear layers from block 30 on: choose other targets"):
        smollm2.targets("all-linear", 30)


def test_several_increments_are_learned_as_they_will_be_applied_row_by_row():
    """The mixture while learning equals the stored increments bound as a mixture, values and gradients."""
    net = small_net().requires_grad_(False)
    bound = Reparameterizer(net, NAMES)
    seed = torch.Generator().manual_seed(0)
    learning = {n: LearningBinding(bound.layers[n].base, 2, 1.5, 0.0, seed, 3) for n in NAMES}
    for binding in learning.values():
        torch.nn.init.normal_(binding.B, generator=seed)
    x = torch.randn(4, 6, 5, generator=seed)
    weights = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.2, 0.3, 0.5], [0.0, 1.0, 0.0]])

    for binding in learning.values():
        binding.weigh(weights)
    bound.bind_each(learning)
    learned = net(x)
    stored = [
        Increment({n: LowRankPair(*learning[n].pairs()[u]) for n in NAMES}, rank=2, alpha=3.0)
        for u in range(3)
    ]
    mixture = Mixture(stored, torch.arange(3).expand(4, 3), weights)
    bound.bind(mixture)
    torch.testing.assert_close(learned, net(x))
    bound.release()
    torch.testing.assert_close(learned, by_hand(small_net(), x, mixture))

    bound.bind_each(learning)
    for row, unused in ((0, 2), (1, 0), (3, 2)):  # what a row is not given gets nothing from it
        for binding in learning.values():
            binding.zero_grad()
            binding.weigh(weights)
        net(x)[row].square().sum().backward()
        for binding in learning.values():
            own = slice(2 * unused, 2 * unused + 2)
            assert not binding.A.grad[own].any()
            assert not binding.B.grad[:, own].any()
            assert binding.B.grad.any()


def test_weights_of_other_rows_than_those_of_the_input_are_refused():
    layer = nn.Linear(5, 7)
    binding = LearningBinding(layer, 2, 1.0, 0.0, torch.Generator(), 2)
    binding.weigh(torch.full((3, 2), 0.5))
    with pytest.raises(BackboneError, match=r"input of shape \(2, 6, 5\), 3 rows are weighed"):
        binding(torch.ones(2, 6, 5))


def test_a_single_increment_starts_as_it_would_among_none_and_the_first_of_several_does_too():
    layer = nn.Linear(5, 7)
    one, three = (
        LearningBinding(layer, 2, 1.0, 0.0, torch.Generator().manual_seed(1), count) for count in (1, 3)
    )
    assert torch.equal(one.A, three.A[:2])
    assert three.A.shape == (6, 5)
    assert three.B.shape == (7, 6)
