import torch
from torch import nn

from slm.backbone.bank import Bank
from slm.backbone.bindings import RowBinding, Rows
from slm.backbone.reparameterize import LearningBinding, ReparameterizedLinear
from slm.increments.increment import Increment, LowRankPair


def test_a_layer_takes_a_stored_change_after_one_that_was_being_learned():
    layer = ReparameterizedLinear(nn.Linear(3, 2))
    x = torch.ones(1, 1, 3)
    layer.bind(LearningBinding(layer.base, 1, 1.0, 0.0, torch.Generator()))
    assert torch.equal(layer(x), layer.base(x))
    layer.bind(None)
    bank = Bank({"layer": layer.base})
    increment = Increment({"layer": LowRankPair(torch.ones(1, 3), torch.ones(2, 1))}, 1, 1.0)
    places = torch.tensor(bank.load([increment]))
    rows = Rows(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), places, 1)
    layer.bind(RowBinding(bank.shelves["layer"], rows))
    torch.testing.assert_close(layer(x), layer.base(x) + 3)


def test_what_is_being_learned_is_no_part_of_the_frozen_layer():
    layer = ReparameterizedLinear(nn.Linear(3, 2))
    layer.bind(LearningBinding(layer.base, 1, 1.0, 0.0, torch.Generator()))
    assert set(layer.state_dict()) == {"base.weight", "base.bias"}
