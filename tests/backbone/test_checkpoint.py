"""Checkpoints that are not the whole of a model, or more than that."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from slm.backbone.load import load_backbone
from slm.backbone.merge import save_merged
from slm.errors import BackboneError
from slm.increments.increment import Increment, LowRankPair
from tests.backbone.families import TEMPLATES, load, save, tokenizer

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def drop(folder, part: str):
    """Take the weights with ``part`` in their name out of a checkpoint."""
    file = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if part not in name}
    save_file(tensors, file, {"format": "pt"})
    return folder


def saved(model, folder, kind: str):
    model.save_pretrained(folder)
    tokenizer(TEMPLATES[kind]).save_pretrained(folder)
    return folder


@pytest.fixture
def llama(tmp_path):
    return save("LLaMA", tmp_path / "llama")


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("lm_head", r"lacks 1 of its weights \(lm_head\.weight\), which would be random ones"),
        ("layers.1.mlp.up", r"lacks 1 of its weights \(model\.layers\.1\.mlp\.up_proj\.weight\), which"),
        (
            ".mlp.",
            r"lacks 9 of its weights \(model\.layers\.0\.mlp\.down_proj\.weight, model\.layers\.0\.mlp\.gate_"
            r"proj\.weight, model\.layers\.0\.mlp\.up_proj\.weight, \.\.\.\), which would be random ones",
        ),
        ("embed_tokens", r"lacks 1 of its weights \(model\.embed_tokens\.weight\)"),
    ],
)
def test_a_checkpoint_without_some_of_its_weights_is_refused_by_their_names(llama, part, said):
    with pytest.raises(
        BackboneError, match=rf"^backbone '.*llama' {said}.*: give a checkpoint that holds them all$"
    ):
        load(drop(llama, part))


def test_a_checkpoint_without_its_head_that_is_not_tied_is_refused(tmp_path):
    model = transformers.LlamaModel(transformers.LlamaConfig(**SIZES, tie_word_embeddings=False))
    with pytest.raises(BackboneError, match=r"lacks 1 of its weights \(lm_head\.weight\)"):
        load(saved(model, tmp_path, "causal"))


def test_a_weight_of_another_shape_than_the_config_describes_is_refused(llama):
    file = llama / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 40}))
    with pytest.raises(
        BackboneError,
        match=r"holds model\.layers\.0\.mlp\.down_proj\.weight of shape \(32, 48\), its config\.json "
        r"describes \(32, 40\): give the weights and the config\.json of one model$",
    ):
        load(llama)


@pytest.mark.parametrize(
    ("model", "config", "kind", "settings"),
    [
        ("LlamaModel", "LlamaConfig", "causal", {"tie_word_embeddings": True}),
        ("LlamaForSequenceClassification", "LlamaConfig", "causal", {"tie_word_embeddings": True}),
        ("BertForMaskedLM", "BertConfig", "encoder", {}),
        ("BertForSequenceClassification", "BertConfig", "encoder", {}),
        ("RobertaForMaskedLM", "RobertaConfig", "encoder", {"max_position_embeddings": 131}),
        ("LayoutLMForMaskedLM", "LayoutLMConfig", "encoder", {}),  # its bare model always has a pooler
    ],
)
def test_a_tied_head_a_missing_pooler_and_what_is_there_besides_are_no_lack(
    tmp_path, model, config, kind, settings
):
    config = getattr(transformers, config)(**SIZES | settings)
    folder = saved(getattr(transformers, model)(config), tmp_path, kind)
    assert load(folder).fingerprint == load(folder).fingerprint


@pytest.fixture
def adapted(llama, tmp_path):
    """A checkpoint beside which an adapter lies."""
    from peft import LoraConfig, get_peft_model

    plain = transformers.AutoModelForCausalLM.from_pretrained(llama)
    get_peft_model(plain, LoraConfig(target_modules=["q_proj"], r=4)).save_pretrained(tmp_path / "adapter")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "adapter" / name, llama)
    return llama


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("is_alone", [False, True])
def test_a_folder_that_holds_an_adapter_is_refused(adapted, is_alone):
    with pytest.raises(
        BackboneError,
        match=r"^backbone '.*' holds a PEFT adapter \(adapter_config\.json\), which would become part of the "
        r"frozen weights: merge it into them first \(merge_and_unload\) or give a folder without it$",
    ):
        load_backbone(str(adapted.with_name("adapter") if is_alone else adapted))


def test_a_merged_checkpoint_without_weights_is_refused_and_the_backbone_is_frozen_again(
    llama, tmp_path, monkeypatch
):
    backbone = load(llama)
    name, layer = next(iter(backbone.reparameterizer.layers.items()))
    before = layer.weight.clone()
    num_out, num_in = layer.shape
    own = Increment({name: LowRankPair(torch.ones(1, num_in), torch.ones(num_out, 1))}, 1, 1.0)
    monkeypatch.setattr(backbone.model, "save_pretrained", backbone.model.config.save_pretrained)
    with pytest.raises(
        BackboneError, match=r"^transformers wrote no weights of backbone '.*llama' into .*: load the back"
    ):
        save_merged(backbone, own, tmp_path / "merged")
    assert backbone.merged is None
    assert torch.equal(layer.weight, before)


needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def change_quantization(folder, settings):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings}))
    return folder


@needs_bitsandbytes
@pytest.mark.parametrize("settings", [{"load_in_8bit": True}, {"load_in_4bit": True}])
def test_a_checkpoint_that_does_not_name_bitsandbytes_is_known_by_how_it_is_loaded(llama, tmp_path, settings):
    wanted = transformers.BitsAndBytesConfig(**settings)
    plain = transformers.AutoModelForCausalLM.from_pretrained(llama, quantization_config=wanted)
    folder = saved(plain, tmp_path / "codes", "causal")
    named = load(folder)
    found = load(change_quantization(folder, settings))
    assert named.quantization == found.quantization == "bitsandbytes"
    assert named.fingerprint == found.fingerprint
    with pytest.raises(BackboneError, match=r"is quantised by bitsandbytes already"):
        load(folder, "bnb-int8")


def test_a_quantised_checkpoint_that_does_not_name_its_method_is_refused(llama):
    with pytest.raises(
        BackboneError,
        match=r"^the config\.json of '.*llama' has a quantization_config without quant_method: add the name",
    ):
        load(change_quantization(llama, {"bits": 4, "group_size": 128}))
