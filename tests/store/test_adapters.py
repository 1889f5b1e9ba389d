"""Adapters that PEFT wrote, read without PEFT; and folders that only look like one."""

from __future__ import annotations

import copy
import json
import os
import pickle
import time

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from slm.errors import IncrementError, StoreError
from slm.store import peft_settings
from slm.store.adapters import read_peft_adapter

CONFIG = LlamaConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
TOKENS = torch.arange(12).view(2, 6)
# PEFT asks transformers for a property by its old name, and warns of what it saves.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(copy.deepcopy(CONFIG)).eval()  # PEFT may change a config


def layers(model) -> dict[str, torch.nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n}


SHAPES = {n: (m.out_features, m.in_features) for n, m in layers(llama()).items()}


def trained(settings: LoraConfig, model=None) -> PeftModel:
    """A PEFT model whose new weights are all random, as if trained."""
    model = get_peft_model(model if model is not None else llama(), settings)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def read(folder):
    return read_peft_adapter(folder, SHAPES, "model")


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        {"r": 16, "lora_alpha": 7, "target_modules": "all-linear"},
        {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "use_rslora": True},
        {"r": 2, "target_modules": r".*\.(0|2)\.mlp\.(up|down)_proj"},
        {"r": 4, "target_modules": ["o_proj"], "layers_to_transform": [1]},
        {"r": 4, "target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "rank_pattern": {"q_proj": 7, r"layers\.1\.self_attn\.k_proj": 1},
            "alpha_pattern": {r".*layers\.[02]\.mlp.*": 11},
        },
        {"r": 5, "rank_pattern": {"v_proj": 2}, "target_modules": ["v_proj", "o_proj"], "use_rslora": True},
        {"r": 64, "target_modules": ["down_proj"], "init_lora_weights": "gaussian"},
    ],
)
def test_an_adapter_gives_the_logits_that_peft_gives_however_its_layers_were_named(tmp_path, settings):
    model = trained(LoraConfig(**settings))
    with torch.no_grad():
        expected = model(TOKENS).logits
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        frozen = llama()(TOKENS).logits
    found = logits_with(read(tmp_path).increment)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - frozen).abs().max() > 1e-2


def logits_with(increment) -> torch.Tensor:
    """What the frozen model computes with an increment in its weights."""
    plain = llama()
    with torch.no_grad():
        for name, pair in increment.pairs.items():
            plain.get_submodule(name).weight += increment.scale * pair.B @ pair.A
        return plain(TOKENS).logits


def adalora(**settings) -> AdaLoraConfig:
    targets = {"target_modules": ["q_proj", "down_proj"], "total_step": 10}
    return AdaLoraConfig(**{"init_r": 6, "lora_alpha": 4, **targets, **settings})


def pruned(model: PeftModel, kept: dict[str, list[bool]]) -> PeftModel:
    """A PEFT model from which training has taken ranks."""
    ranks = {f"{name}.lora_E.default": flags for name, flags in kept.items()}
    model.base_model.resize_modules_by_rank_pattern(ranks, "default")
    model.peft_config["default"].rank_pattern = ranks
    return model


Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"
KEPT = {Q: [True, False, True, True, False, False], DOWN: [False] * 6}


@pytest.mark.parametrize("kept", [{}, KEPT])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora_alpha": 0},
        {"r": 3, "alpha_pattern": {"q_proj": 9}, "use_rslora": True, "target_modules": "all-linear"},
    ],
)
@pytest.mark.filterwarnings("ignore:Note that `r` is not used in AdaLora:UserWarning")
@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_an_adalora_adapter_gives_the_logits_that_peft_gives_whatever_ranks_training_left(
    tmp_path, settings, kept
):
    model = pruned(trained(adalora(**settings)), kept)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        frozen = llama()(TOKENS).logits
        expected = PeftModel.from_pretrained(llama(), tmp_path).eval()(TOKENS).logits
    adapter = read(tmp_path).increment
    torch.testing.assert_close(logits_with(adapter), expected, rtol=0, atol=1e-5)
    assert (expected - frozen).abs().max() > 1e-2
    assert adapter.rank == 6
    assert (DOWN in adapter.pairs) == (not kept)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"init_r": 5}, "says rank 5 for 'model.layers.0"),
        ({"init_r": -1}, "has init_r -1: it must be a whole number, from 0"),
        ({"init_r": 10**400}, "has init_r 1000"),
        ({"lora_alpha": float("nan")}, "has alpha nan"),
        ({"rank_pattern": [1]}, "has a rank_pattern that is not an object"),
        ({"rank_pattern": {f"{Q}.lora_E": 6}}, "that is no list of true and false"),
        ({"rank_pattern": {f"{Q}.lora_E": [True] * 5}}, f"says rank 5 for '{Q}'"),
        ({"bias": "all"}, "sets bias = 'all'"),
        ({"a_setting_of_tomorrow": 1}, "sets 'a_setting_of_tomorrow'"),
        ({"peft_type": "LORA"}, "sets 'beta1', 'beta2'"),
    ],
)
def test_settings_of_adalora_that_cannot_be_meant_are_refused(tmp_path, changes, said):
    trained(adalora()).save_pretrained(tmp_path)
    change_settings(tmp_path, **changes)
    assert said in refused(tmp_path, IncrementError)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora_E": lambda t: None}, "has no lora_E for"),
        ({"lora_A": lambda t: None}, "has no lora_A for"),
        ({"lora_E": lambda t: t[:5]}, "of rank 6, it must be (6, 1): the adapter is damaged"),
        ({"lora_E": lambda t: t.flatten()}, "has lora_E (6,) for"),
        ({"lora_E": lambda t: t * torch.nan}, "holds NaN or infinity at"),
        (
            {"lora_A": lambda t: t * 1e30, "lora_E": lambda t: t * 1e30},
            "has an s · B A too large for float32",
        ),
    ],
)
def test_tensors_of_adalora_that_cannot_be_meant_are_refused(tmp_path, changes, said):
    trained(adalora()).save_pretrained(tmp_path)
    change_tensors(tmp_path, **changes)
    assert said in refused(tmp_path)


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_an_adalora_adapter_without_any_rank_is_refused(tmp_path):
    trained(adalora(init_r=0, target_modules=["q_proj"], lora_alpha=1)).save_pretrained(tmp_path)
    assert "changes no layer: all its ranks are 0" in refused(tmp_path, IncrementError)


def test_an_adapter_of_the_model_without_its_head_fits_the_one_with_it(tmp_path):
    settings = LoraConfig(r=4, target_modules=["q_proj"])
    trained(settings, llama().model).save_pretrained(tmp_path)
    assert set(read(tmp_path).increment.pairs) == {f"model.layers.{i}.self_attn.q_proj" for i in range(3)}


@pytest.fixture
def folder(tmp_path):
    trained(LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])).save_pretrained(tmp_path)
    return tmp_path


def refused(folder, error=(IncrementError, StoreError)) -> str:
    with pytest.raises(error) as caught:
        read(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, "sets 'use_dora': that means more than a change of s · B A"),
        ({"bias": "lora_only"}, "sets bias = 'lora_only'"),
        ({"init_lora_weights": "pissa"}, "sets init_lora_weights = 'pissa'"),
        ({"init_lora_weights": "olora"}, "sets init_lora_weights = 'olora'"),
        ({"trainable_token_indices": [1, 2]}, "sets 'trainable_token_indices'"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "sets 'layer_replication'"),
    ],
)
def test_variants_that_peft_writes_are_refused_by_their_name(tmp_path, settings, said):
    trained(LoraConfig(r=4, target_modules=["q_proj"], **settings)).save_pretrained(tmp_path)
    assert said in refused(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embeddings saved with an adapter"),
    ],
)
def test_embeddings_and_the_language_model_head_are_refused(tmp_path, settings, said):
    trained(LoraConfig(r=4, **settings)).save_pretrained(tmp_path)
    assert said in refused(tmp_path)


@pytest.mark.parametrize("kind", ["LOHA", "LOKR", "IA3", "OFT", "VERA", "", None, 7, ["LORA"]])
def test_other_kinds_of_adapter_are_refused_by_their_name(folder, kind):
    change_settings(folder, peft_type=kind)
    assert f"has peft_type {kind!r}: only LORA and ADALORA can be imported" in refused(folder)


def change_settings(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(folder, **changes):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for half, change in changes.items():
        name = next(n for n in tensors if half in n)
        found = change(tensors.pop(name))
        if found is not None:
            tensors[name] = found.contiguous()
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 2**30}, "says rank 1073741824 for 'model.layers.0"),
        ({"r": "4"}, "says rank '4'"),
        ({"lora_alpha": None}, "has alpha None"),
        ({"lora_alpha": float("nan")}, "has alpha nan"),
        ({"lora_alpha": 10**400}, "has alpha 1000"),
        ({"rank_pattern": {"q_proj": 5}}, "says rank 5 for 'model.layers.0.self_attn.q_proj'"),
        ({"rank_pattern": ["q_proj"]}, "has a rank_pattern that is not an object"),
        ({"alpha_pattern": {"(": 1}}, "has the pattern '(', which is no regular expression"),
        ({"alpha_pattern": {"q" * 2000: 1}}, "which has more than 1000 letters"),
        ({"rank_pattern": {f"q{i}": 4 for i in range(1025)}}, "not an object of at most 1024 patterns"),
        ({"lora_bias": True}, "sets 'lora_bias'"),
        ({"a_setting_of_tomorrow": {"x": 1}}, "sets 'a_setting_of_tomorrow'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(folder, changes, said):
    change_settings(folder, **changes)
    assert said in refused(folder, IncrementError)


def test_a_pattern_that_would_match_for_ever_is_given_up(folder):
    change_settings(folder, alpha_pattern={r"((\w|[a-z]|\.)+)+[!?]": 3})
    begun = time.monotonic()
    assert "takes too long to match" in refused(folder, IncrementError)
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("a{1000000000}", "repeats more than 100 times"),
        ("[a-z]{100000000}", "repeats more than 100 times"),
        ("(((a{5,30}){30}){30})", "repeats more than 100 times"),
        ("(?R)", "uses more than classes, groups, look-around and repeats"),
        (r"(a)\1", "uses more than classes"),
        (r"\\{1000000000}", "repeats more than 100 times"),
        ("(?:q_proj){e<=1}", "uses more than classes"),
        ("(" * 450 + ")" * 450, "has more than 50 groups"),
        ("([)]" * 51 + ")" * 51, "has more than 50 groups"),
    ],
)
def test_a_pattern_that_could_take_all_memory_is_refused_before_it_is_compiled(folder, pattern, said):
    change_settings(folder, rank_pattern={pattern: 4})
    begun = time.monotonic()
    assert said in refused(folder, IncrementError)
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize(
    "pattern",
    [
        r"model\.layers\.[0-9]{1,2}\.(self_attn|mlp)\.(?:q_proj|down_proj)",
        r"(?!.*vision)\w+(?<=q_proj|down_proj)",
        r"(\.?|\{a)?(q_proj|down_proj){1}",
    ],
)
def test_patterns_that_adapters_use_are_understood(folder, pattern):
    change_settings(folder, r=9, rank_pattern={pattern: 4})
    assert read(folder).increment.rank == 4


def test_a_pattern_is_compiled_once_whatever_the_number_of_modules(folder, monkeypatch):
    compiled = []
    own = peft_settings.regex.compile
    monkeypatch.setattr(peft_settings.regex, "compile", lambda *a, **k: compiled.append(a) or own(*a, **k))
    change_settings(folder, alpha_pattern={"nothing": 1, "none": 2})
    read(folder)
    assert len(compiled) == 2


@pytest.mark.parametrize("error", [MemoryError, RecursionError])
def test_a_pattern_that_cannot_be_compiled_all_the_same_is_refused(folder, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(peft_settings.regex, "compile", fail)
    change_settings(folder, alpha_pattern={"q_proj": 1})
    assert "has the pattern 'q_proj', which is no regular expression of a usual size" in refused(folder)


def test_many_patterns_share_one_budget_of_time(folder, monkeypatch):
    monkeypatch.setattr(peft_settings, "_PATTERNS_TIME_S", 0.01)
    change_settings(folder, alpha_pattern={f"({i}|" + "[a-z]" * 150 + ")": 3 for i in range(1000)})
    begun = time.monotonic()
    assert "takes too long to match" in refused(folder, IncrementError)
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora_A": lambda t: t[:2]}, "has lora_A (2, "),
        ({"lora_A": lambda t: t[:, :-1]}, "trained on another backbone"),
        ({"lora_B": lambda t: t[:-1]}, "trained on another backbone"),
        ({"lora_A": lambda t: t.flatten()}, "trained on another backbone"),
        ({"lora_A": lambda t: t[:0], "lora_B": lambda t: t[:, :0]}, "has rank 0"),
        (
            {"lora_A": lambda t: t.new_ones(1025, t.shape[1]), "lora_B": lambda t: t.new_ones(len(t), 1025)},
            "1025",
        ),
        ({"lora_A": lambda t: None}, "has no lora_A for"),
        ({"lora_B": lambda t: None}, "has no lora_B for"),
        ({"lora_A": lambda t: t * torch.nan}, "holds NaN or infinity at"),
        ({"lora_B": lambda t: t / 0}, "holds NaN or infinity at"),
        ({"lora_A": lambda t: t.double() * 1e300}, "holds values too large for float32 at"),
        ({"lora_B": lambda t: t.double() * torch.nan}, "holds NaN or infinity at"),
        ({"lora_A": lambda t: t.to(torch.int32)}, "values must be floats of 16 bits or more"),
    ],
)
def test_tensors_that_cannot_be_meant_are_refused(folder, changes, said):
    change_tensors(folder, **changes)
    assert said in refused(folder)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", "a DoRA adapter"),
        ("base_model.model.model.embed_tokens.weight", "embeddings saved with an adapter"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "changed embeddings cannot be an increment"),
        ("base_model.model.lm_head.weight", "a language-model head saved with an adapter"),
        ("base_model.model.model.layers.0.self_attn.q_proj.bias", "changed biases"),
        ("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", "has no lora_B"),
        ("../../../etc/passwd", "it is no lora_A or lora_B weight of PEFT's"),
        (".lora_A.weight", "it is no lora_A or lora_B weight of PEFT's"),
        ("base_model.model..lora_A.weight", "it is no lora_A or lora_B weight of PEFT's"),
    ],
)
def test_tensors_that_do_not_belong_are_refused(folder, name, said):
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | {name: torch.ones(2, 2)}, file)
    message = refused(folder)
    assert said in message or "no linear layer of a block" in message


def test_of_what_is_left_out_the_name_alone_is_read(folder):
    change_settings(folder, modules_to_save=["lm_head"])
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.lm_head.weight": torch.full((2, 2), torch.nan)}, file)
    assert "saves the module of 'lm_head.weight' whole (modules_to_save)" in refused(folder)
    assert read_peft_adapter(folder, SHAPES, "model", unused=("lm_head", "score")).left_out == ("lm_head",)


def test_a_module_that_no_backbone_layer_matches_is_named(folder):
    with pytest.raises(
        IncrementError, match=r"changes 'model\.layers\.0\.\w+\.\w+', which is no linear layer"
    ):
        read_peft_adapter(folder, {"other": (1, 1)}, "model")


HOSTILE = "x\x1b[2J\nFAKE LINE"


@pytest.mark.parametrize(
    "names",
    [
        (f"{HOSTILE}.lora_A.weight",),
        (f"base_model.model.{HOSTILE}.lora_A.weight", f"base_model.model.{HOSTILE}.lora_B.weight"),
        (f"base_model.model.model.layers.0.{HOSTILE}",),
    ],
)
def test_names_of_a_hostile_file_reach_no_terminal(folder, names):
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | {name: torch.ones(2, 2) for name in names}, file)
    message = refused(folder)
    assert message.isprintable()
    assert "FAKE LINE" in message


@pytest.mark.parametrize(
    "changes", [{HOSTILE: 1}, {"peft_type": HOSTILE}, {"alpha_pattern": {f"({HOSTILE}": 1}}]
)
def test_settings_of_a_hostile_file_reach_no_terminal(folder, changes):
    change_settings(folder, **changes)
    message = refused(folder)
    assert message.isprintable()
    assert "FAKE LINE" in message


def test_the_same_layer_under_two_names_is_refused(folder):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {n.replace(".model.model.", ".model."): t.clone() for n, t in tensors.items()}, file)
    assert "twice: one pair per layer is needed" in refused(folder)


@pytest.mark.parametrize("changes", [{"lora_alpha": 1e9}, {"lora_alpha": -1e9, "use_rslora": True}])
def test_finite_values_whose_product_is_infinite_are_refused(folder, changes):
    change_tensors(folder, lora_B=lambda t: torch.full_like(t, 1e38))
    assert read(folder).increment.scale == 2
    change_settings(folder, **changes)
    assert "has an s · B A too large for float32 at" in refused(folder, IncrementError)


def test_a_down_half_that_takes_every_text_to_infinity_is_refused(folder):
    change_tensors(folder, lora_A=lambda t: torch.full_like(t, 3e37), lora_B=lambda t: t * 1e-38)
    assert "has a lora_A too large for float32 at" in refused(folder, IncrementError)


def test_scales_too_far_apart_for_one_increment_are_refused(folder):
    change_settings(folder, lora_alpha=1e-30, alpha_pattern={r"model\.layers\.1\..*": 1e9})
    assert "holds NaN or infinity at model.layers.1." in refused(folder, IncrementError)


def test_values_of_64_bits_become_float32(folder):
    change_tensors(folder, lora_A=torch.Tensor.double)
    pairs = read(folder).increment.pairs.values()
    assert {tensor.dtype for pair in pairs for tensor in (pair.A, pair.B)} == {torch.float32}


class _Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)


def test_a_pickle_is_named_and_never_opened(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(_Bomb()))
    assert "holds its weights as a pickle ('adapter_model.bin'), which is never opened" in refused(folder)
    (folder / "adapter_model.safetensors").write_bytes(pickle.dumps(_Bomb()))
    assert "announces a header of" in refused(folder)


def test_links_pipes_folders_and_nothing_are_refused(folder, tmp_path_factory):
    model, secret = folder / "adapter_model.safetensors", tmp_path_factory.mktemp("secret") / "file"
    secret.write_bytes(model.read_bytes())
    model.unlink()
    model.symlink_to(secret)
    assert "is a link, which is not followed" in refused(folder)
    model.unlink()
    os.mkfifo(model)
    assert "is not an adapter folder (no file adapter_model.safetensors)" in refused(folder)
    model.unlink()
    model.mkdir()
    assert "is not an adapter folder" in refused(folder)
    (folder / "adapter_config.json").unlink()
    assert "is not an adapter folder (no file adapter_config.json)" in refused(folder)
    assert "is not an adapter folder" in refused(folder / "nowhere")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        (2**62).to_bytes(8, "little") + b"{}",
        (2**26).to_bytes(8, "little") + b"{" * 100,
        (2).to_bytes(8, "little") + b"[]",
        (70).to_bytes(8, "little")
        + b'{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}'.ljust(70)
        + b"\0" * 4,
        (100).to_bytes(8, "little")
        + b'{"x":{"dtype":"F32","shape":[99999999999,99999999999],"data_offsets":[0,4]}}'.ljust(100)
        + b"\0" * 4,
    ],
)
def test_bytes_that_are_no_safetensors_file_are_refused(folder, data):
    (folder / "adapter_model.safetensors").write_bytes(data)
    message = refused(folder, StoreError)
    assert "is not a safetensors file" in message or "announces a header" in message


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", "7", " " * 2_000_000])
def test_settings_that_are_no_small_json_object_are_refused(folder, text):
    (folder / "adapter_config.json").write_text(text)
    message = refused(folder, IncrementError)
    assert any(said in message for said in ("is not JSON", "must hold a JSON object", "are read"))
