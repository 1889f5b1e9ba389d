"""The invariants again where the frozen weights are 8-bit or 4-bit codes and the increments floats.

bitsandbytes is held to them on the CPU.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from slm.backbone.backbone import Backbone, BackboneKind
from slm.backbone.decode import prefill
from slm.backbone.load import load_backbone
from slm.backbone.quantization import PACKAGES, is_quantised
from slm.config import BackboneConfig
from slm.errors import BackboneError
from slm.model import ScalableLM
from slm.tasks import Task
from tests.backbone import test_families as floats
from tests.backbone.families import load
from tests.backbone.test_families import PROMPTS, batch_of, every, feature, outputs, settings

CONV1D_ONLY = ("GPT-2",)
"""Families whose blocks have no ``nn.Linear``, the one layer that torchao quantises."""


SAMPLE = ("BERT", "LLaMA", "GPT-2", "T5")
"""A family of each sort, which is always run; the others where all are asked for."""


@pytest.fixture
def load_quantised(folder_of) -> Callable[[str, str], Backbone]:
    """Loads a family's model, its weights quantised."""

    def find(family: str, quantization: str) -> Backbone:
        package = PACKAGES[quantization]
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'scalable-lm[quantized]'")
        is_sample = family in SAMPLE or (package == "torchao" and family != "SmolLM2")
        if not is_sample and not os.environ.get("SLM_ALL_BACKBONES"):
            pytest.skip("bitsandbytes in every family, and SmolLM2, take long here: SLM_ALL_BACKBONES=1")
        aliases = {"MiniLM": "minilm", "SmolLM2": "smollm2"}
        return load(aliases.get(family) or folder_of(family), quantization)

    return find


def check(family: str, quantization: str, load_quantised: Any, folder: Any) -> None:
    """Zero increment exact, mixed batch = each row alone, gradients, learn, save and load."""
    backbone = load_quantised(family, quantization)
    layers = [layer.base.weight for layer in backbone.reparameterizer.layers.values()]
    assert sum(is_quantised(weight) for weight in layers) >= 0.7 * len(layers)  # T5 keeps `wo` wide
    floats.test_a_zero_increment_equals_the_backbone_to_the_bit(backbone)
    # T5 does not scale its scores: with random codes its blocks multiply the last bit of a sum by hundreds.
    floats.check_each_row_alone(backbone, tolerance=2e-4 if family == "T5" else 2e-5)
    floats.test_gradients_reach_the_increment_and_nothing_else(backbone)
    rows = [{"text": f"{p} {n}", "label": y} for n in range(4) for p, y in zip(PROMPTS, "abc", strict=True)]
    model = ScalableLM.create(folder / "store", backbone, settings(1 if family == "SmolLM2" else 2))
    model.learn(Task.from_rows("letters", rows))
    again = ScalableLM.open(folder / "store", load_quantised(family, quantization))
    found = []
    for other in (model, again):
        assert [record.name for record in other.tasks] == ["letters"]
        batch = batch_of(other.backbone, PROMPTS)
        with other._adapting(other.knowledge, batch, PROMPTS):
            if other.backbone.kind is not BackboneKind.ENCODER:
                prefill(other.backbone, batch)
            assert any(layer.binding is not None for layer in other.backbone.reparameterizer.layers.values())
            found.append(outputs(other.backbone, batch_of(other.backbone, PROMPTS, floats.ANSWERS)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert model.ask(PROMPTS, max_new_tokens=4) == again.ask(PROMPTS, max_new_tokens=4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("package", ["int8", "bnb-int8"])
def test_t5_bends_whatever_dtype_its_weights_were_stored_in(folder_of, tmp_path, package, stored, dtype):
    pytest.importorskip(PACKAGES[package])
    transformers.AutoModelForSeq2SeqLM.from_pretrained(folder_of("T5"), dtype=stored).save_pretrained(
        tmp_path
    )
    transformers.AutoTokenizer.from_pretrained(folder_of("T5")).save_pretrained(tmp_path)
    wanted = BackboneConfig(dtype=dtype, device="cpu", max_tokens=96, quantization=package)
    backbone = load_backbone(str(tmp_path), wanted)
    batch = batch_of(backbone, PROMPTS)
    frozen = outputs(backbone, batch_of(backbone, PROMPTS, floats.ANSWERS))
    backbone.reparameterizer.bind(floats.mixture(backbone))
    bent = outputs(backbone, batch_of(backbone, PROMPTS, floats.ANSWERS))
    assert prefill(backbone, batch).logits.dtype == bent[0].dtype == backbone.dtype == getattr(torch, dtype)
    assert not torch.allclose(bent[0], frozen[0], atol=1e-2)
    assert torch.equal(bent[2], frozen[2])  # the row that abstains
    backbone.reparameterizer.release()
    floats.test_gradients_reach_the_increment_and_nothing_else(backbone)


@every
@feature("int8")
def test_increments_work_on_torchao_weights_of_8_bits(family, load_quantised, tmp_path, record_property):
    if family in CONV1D_ONLY:
        record_property("outcome", "refused")
        with pytest.raises(
            BackboneError,
            match=r"keeps the weights of its blocks in Conv1D, which int8 leaves as floats: set",
        ):
            load_quantised(family, "int8")
        return
    check(family, "int8", load_quantised, tmp_path)


@every
@feature("bnb-int8")
def test_increments_work_on_bitsandbytes_weights_of_8_bits(family, load_quantised, tmp_path):
    check(family, "bnb-int8", load_quantised, tmp_path)


@every
@feature("bnb-4bit")
def test_increments_work_on_bitsandbytes_weights_of_4_bits(family, load_quantised, tmp_path):
    check(family, "bnb-4bit", load_quantised, tmp_path)
