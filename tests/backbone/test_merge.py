"""Merging bakes an increment in, and unmerging leaves no trace of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from slm.backbone.merge import Merge, _merged
from slm.backbone.reparameterize import Mixture, ReparameterizedLinear, Reparameterizer
from slm.backbone.targets import find_linear
from slm.errors import BackboneError, IncrementError
from slm.increments.increment import Increment, LowRankPair

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 60,
}
TOKENS = torch.arange(14).view(2, 7)


@pytest.fixture(params=["llama", "bert"])
def model(request):
    torch.manual_seed(0)
    if request.param == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).eval()
    return BertModel(BertConfig(**SIZES), add_pooling_layer=False).eval()


PROBE = {
    "input_ids": torch.ones(1, 3, dtype=torch.long),
    "attention_mask": torch.ones(1, 3, dtype=torch.long),
}


def wrap(model: nn.Module, dtype: torch.dtype) -> tuple[Reparameterizer, Increment]:
    """A model's linear layers wrapped, and an increment for half of them."""
    bound = Reparameterizer(model.to(dtype), [layer.name for layer in find_linear(model, PROBE)])
    random = torch.Generator().manual_seed(1)
    pairs = {
        name: LowRankPair(
            torch.randn(3, layer.shape[1], generator=random) / 4,
            torch.randn(layer.shape[0], 3, generator=random) / 4,
        )
        for name, layer in list(bound.layers.items())[::2]
    }
    return bound, Increment(pairs, 3, 2.0)


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_restores_every_bit(model, dtype):
    bound, increment = wrap(model, dtype)
    before, frozen = copy.deepcopy(model.state_dict()), output(model)
    places = {name: layer.base.weight.data_ptr() for name, layer in bound.layers.items()}
    merge = Merge(bound.layers, increment)
    changed = {
        name.removesuffix(".base.weight")
        for name, tensor in model.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    assert changed == set(increment.pairs)
    assert all(tensor.dtype == before[name].dtype for name, tensor in model.state_dict().items())
    merge.undo()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(output(model), frozen)
    assert {name: layer.base.weight.data_ptr() for name, layer in bound.layers.items()} == places
    merge.undo()  # a second time is nothing
    assert torch.equal(output(model), frozen)


def test_merged_weights_give_what_the_bound_increment_gives(model):
    bound, increment = wrap(model, torch.float32)
    frozen = output(model)
    bound.bind(Mixture([increment], torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)))
    expected = output(model)
    bound.release()
    Merge(bound.layers, increment)
    torch.testing.assert_close(output(model), expected, rtol=0, atol=1e-5)
    assert (expected - frozen).abs().max() > 1e-2


def test_a_merged_bfloat16_weight_is_rounded_once(model):
    bound, increment = wrap(model, torch.bfloat16)
    name, pair = next(iter(increment.pairs.items()))
    expected = bound.layers[name].base.weight.float() + increment.scale * pair.B @ pair.A
    Merge(bound.layers, increment)
    assert torch.equal(bound.layers[name].base.weight, expected.bfloat16())


def test_a_conv1d_keeps_its_own_layout():
    layer = Conv1D(5, 3)  # 3 features to 5
    pair = LowRankPair(torch.randn(2, 3), torch.randn(5, 2))
    x = torch.randn(4, 3)
    expected = layer(x) + 0.5 * x @ pair.A.T @ pair.B.T
    layer.weight.data = _merged(layer, pair, 0.5)
    torch.testing.assert_close(layer(x), expected)


def linear(num_in: int = 4, num_out: int = 3) -> ReparameterizedLinear:
    return ReparameterizedLinear(nn.Linear(num_in, num_out))


def change(*names: str) -> Increment:
    return Increment({n: LowRankPair(torch.ones(2, 4), torch.ones(3, 2)) for n in names}, 2, 2.0)


def test_what_cannot_be_merged_is_refused_and_nothing_is_changed():
    good, wide, twin, shared = linear(), linear(8), linear(), linear()
    twin.base.weight = shared.base.weight
    quantised = linear()
    quantised.base.weight = nn.Parameter(torch.ones(3, 4, dtype=torch.int8), requires_grad=False)
    layers = {"good": good, "wide": wide, "twin": twin, "shared": shared, "quantised": quantised}
    before = good.base.weight.clone()
    for names, error, said in [
        (("good", "other"), IncrementError, "changes other, which is not re-parameterized"),
        (("good", "wide"), IncrementError, "at wide maps 4 to 3 features, the layer 8 to 3"),
        (("good", "shared", "twin"), BackboneError, "shared shares its weights with twin"),
        (("good", "twin"), BackboneError, "twin shares its weights with shared"),
        (("good", "quantised"), BackboneError, "quantised holds quantised weights"),
    ]:
        with pytest.raises(error, match=said):
            Merge(layers, change(*names))
        assert torch.equal(good.base.weight, before)


def test_a_merge_that_breaks_off_half_way_is_taken_back(monkeypatch):
    layers = {"a": linear(), "b": linear()}
    before = {name: layer.base.weight.clone() for name, layer in layers.items()}
    calls = []

    def exhausted(layer, pair, scale):
        calls.append(layer)
        if len(calls) == 2:
            raise MemoryError
        return _merged(layer, pair, scale)

    monkeypatch.setattr("slm.backbone.merge._merged", exhausted)
    with pytest.raises(MemoryError):
        Merge(layers, change("a", "b"))
    assert all(torch.equal(layers[name].base.weight, weight) for name, weight in before.items())
