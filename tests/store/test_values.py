from __future__ import annotations

import json
import pickle

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import save
from transformers import LlamaConfig, LlamaForCausalLM

from slm.errors import IncrementError, StoreError
from slm.increments.increment import Increment, LowRankPair
from slm.store.values import (
    ADAPTER_CONFIG,
    ADAPTER_MODEL,
    bytes_to_tensors,
    read_adapter,
    replace_bytes,
    tensors_to_bytes,
    write_adapter,
)

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
A, B = (f"base_model.model.m.lora_{half}.weight" for half in "AB")
GOOD = {A: torch.ones(2, 5), B: torch.ones(4, 2)}


@pytest.fixture
def increment():
    random = torch.Generator().manual_seed(0)
    shapes = {MODULES[0]: (32, 32), MODULES[1]: (64, 32)}
    pairs = {
        name: LowRankPair(torch.randn(3, i, generator=random), torch.randn(o, 3, generator=random))
        for name, (i, o) in shapes.items()
    }
    return Increment(pairs, rank=3, alpha=7.5)


@pytest.fixture
def adapter(tmp_path, increment):
    write_adapter(tmp_path / "adapter", increment, "a/backbone")
    return tmp_path / "adapter"


def test_an_increment_comes_back_bit_for_bit(adapter, increment):
    found = read_adapter(adapter)
    assert (found.rank, found.alpha, list(found.pairs)) == (3, 7.5, list(increment.pairs))
    for name, pair in increment.pairs.items():
        assert torch.equal(found.pairs[name].A, pair.A)
        assert torch.equal(found.pairs[name].B, pair.B)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_increment_keeps_its_dtype(tmp_path, increment, dtype):
    write_adapter(tmp_path / "a", increment.to("cpu", dtype), "a/backbone")
    assert {pair.A.dtype for pair in read_adapter(tmp_path / "a").pairs.values()} == {dtype}


def test_an_empty_increment_can_be_stored(tmp_path):
    write_adapter(tmp_path / "a", Increment({}, rank=1, alpha=1.0), "a/backbone")
    assert dict(read_adapter(tmp_path / "a").pairs) == {}


# PEFT asks transformers for a property by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_loads_the_folder_and_gives_the_logits_of_adding_s_b_a_by_hand(adapter, increment):
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=11, num_attention_heads=4
    )
    torch.manual_seed(0)
    by_hand = LlamaForCausalLM(config).eval()
    backbone = LlamaForCausalLM(config).eval()
    backbone.load_state_dict(by_hand.state_dict())
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        frozen = by_hand(tokens).logits
        for name, pair in increment.pairs.items():
            by_hand.get_submodule(name).weight += increment.scale * pair.B @ pair.A
        expected = by_hand(tokens).logits

        settings = PeftConfig.from_pretrained(adapter)
        assert (settings.base_model_name_or_path, settings.r, settings.lora_alpha) == ("a/backbone", 3, 7.5)
        model = PeftModel.from_pretrained(backbone, adapter).eval()
        found = model(tokens).logits
        adapted = {n.split(".lora_A")[0] for n, _ in model.named_parameters() if "lora_A" in n}
        assert adapted == {f"base_model.model.{name}" for name in MODULES}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - frozen).abs().max() > 0.1


def test_views_and_shared_tensors_are_stored_by_value():
    whole = torch.arange(6.0).view(2, 3)
    found = bytes_to_tensors(tensors_to_bytes({"whole": whole, "turned": whole.T, "row": whole[0]}), "f")
    assert torch.equal(found["turned"], whole.T)
    assert torch.equal(found["row"], whole[0])


def test_a_replaced_file_is_whole_and_leaves_nothing_beside_it(tmp_path):
    replace_bytes(tmp_path / "f", b"old")
    replace_bytes(tmp_path / "f", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"f": b"new"}


class _Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not tensors",
        pickle.dumps(_Bomb()),
        save(GOOD)[:-1],
        (2**63).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (70).to_bytes(8, "little")
        + b'{"x":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}'.ljust(70)
        + b"\0" * 4,
        (70).to_bytes(8, "little")
        + b'{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}'.ljust(70)
        + b"\0" * 4,
    ],
)
def test_bytes_that_are_no_safetensors_file_are_refused_in_one_line(adapter, data):
    (adapter / ADAPTER_MODEL).write_bytes(data)
    with pytest.raises(StoreError) as caught:
        read_adapter(adapter)
    assert str(caught.value) == (
        f"{adapter}/{ADAPTER_MODEL} is not a safetensors file torch can hold: restore it from a copy"
    )


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({A: GOOD[A]}, "has no lora_B for 'm': the file does not hold one increment"),
        ({B: GOOD[B]}, "has no lora_A for 'm': the file does not hold one increment"),
        (GOOD | {B: torch.ones(4, 3)}, "a low-rank pair needs A (R, I) and B (O, R), got (2, 5) and (4, 3)"),
        (GOOD | {A: torch.ones(5)}, "got (5,) and (4, 2): the file does not hold one increment"),
        ({A: torch.ones(3, 5), B: torch.ones(4, 3)}, "increment of rank 2 holds a pair of rank 3 at m"),
        (
            GOOD | {A: torch.full((2, 5), torch.nan)},
            f"holds NaN or infinity at {A!r}: restore it from a copy",
        ),
        (
            GOOD | {B: torch.full((4, 2), torch.inf)},
            f"holds NaN or infinity at {B!r}: restore it from a copy",
        ),
        (GOOD | {A: torch.ones(2, 5, dtype=torch.int32)}, "an increment has floating point values"),
        (GOOD | {"extra": torch.ones(1)}, "holds 'extra', which is no lora_A or lora_B weight"),
        (GOOD | {"base_model.model..lora_A.weight": torch.ones(1)}, "which is no lora_A or lora_B weight"),
    ],
)
def test_tensors_that_are_no_increment_are_refused_in_one_line(adapter, tensors, said):
    (adapter / ADAPTER_CONFIG).write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    (adapter / ADAPTER_MODEL).write_bytes(save(tensors))
    with pytest.raises((StoreError, IncrementError)) as caught:
        read_adapter(adapter)
    assert str(caught.value).startswith(f"{adapter}/{ADAPTER_MODEL}")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "only peft_type LORA is an increment"),
        ({"r": "8"}, "has r = '8': it must be a whole number, at least 1"),
        ({"r": True}, "has r = True"),
        ({"r": 0}, "has r = 0"),
        ({"lora_alpha": None}, "has lora_alpha = None: it must be a number up to 1e9"),
        ({"lora_alpha": float("nan")}, "has lora_alpha = nan"),
        ({"lora_alpha": float("-inf")}, "has lora_alpha = -inf"),
        ({"lora_alpha": 10**400}, "has lora_alpha = 1000"),
        ({"use_rslora": True}, "sets use_rslora: only plain LoRA"),
        ({"rank_pattern": {"q": 4}, "use_dora": True}, "sets use_dora, rank_pattern: only plain LoRA"),
        ({"bias": "all"}, "sets bias: only plain LoRA"),
    ],
)
def test_settings_that_mean_something_else_are_refused(adapter, change, said):
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(IncrementError) as caught:
        read_adapter(adapter)
    assert str(caught.value).startswith(f"{adapter}/{ADAPTER_CONFIG} ")
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", "7", '{"r": 1' + "0" * 5000 + "}"])
def test_settings_that_are_no_json_object_are_refused(adapter, text):
    (adapter / ADAPTER_CONFIG).write_text(text)
    with pytest.raises(IncrementError, match=r"is not JSON|does not describe a LoRA adapter"):
        read_adapter(adapter)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(StoreError) as caught:
        read_adapter(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} is not an adapter folder (no file adapter_config.json): "
        "it needs adapter_config.json and adapter_model.safetensors"
    )
