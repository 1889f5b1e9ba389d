"""What leaves a backbone, family by family: merged weights, and adapters that PEFT loads."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from slm.backbone.backbone import Backbone, BackboneKind
from slm.backbone.merge import merge, save_merged, unmerge
from slm.backbone.reparameterize import Mixture
from slm.config import Config, RetrievalConfig
from slm.errors import IncrementError
from slm.model import ScalableLM
from slm.store.values import write_adapter
from tests.backbone.test_families import (
    ANSWERS,
    PROMPTS,
    assert_close,
    batch_of,
    every,
    feature,
    increment,
    outputs,
)

AUTO = {
    BackboneKind.ENCODER: transformers.AutoModel,
    BackboneKind.CAUSAL: transformers.AutoModelForCausalLM,
    BackboneKind.SEQUENCE_TO_SEQUENCE: transformers.AutoModelForSeq2SeqLM,
}


def bent(backbone: Backbone, own) -> list[torch.Tensor]:
    """Outputs with one increment bound to every row."""
    rows = len(PROMPTS)
    backbone.reparameterizer.bind(Mixture([own], torch.zeros(rows, 1, dtype=torch.long), torch.ones(rows, 1)))
    found = outputs(backbone, batch_of(backbone, PROMPTS, ANSWERS))
    backbone.reparameterizer.release()
    return found


def outputs_of(model, backbone: Backbone) -> list[torch.Tensor]:
    """Outputs of another model on the backbone's batch."""
    own, backbone.model = backbone.model, model.eval()
    try:
        return outputs(backbone, batch_of(backbone, PROMPTS, ANSWERS))
    finally:
        backbone.model = own


@every
@feature("merge and unmerge")
def test_merged_weights_do_what_the_increment_does_and_unmerging_leaves_no_trace(backbone, tmp_path):
    own = increment(backbone, 1, 0.05)
    frozen, expected = outputs(backbone, batch_of(backbone, PROMPTS, ANSWERS)), bent(backbone, own)
    assert not torch.allclose(expected[0], frozen[0], atol=1e-3)
    merge(backbone, own)
    merged = outputs(backbone, batch_of(backbone, PROMPTS, ANSWERS))
    unmerge(backbone)
    assert_close(merged, expected, 1e-4)
    again = outputs(backbone, batch_of(backbone, PROMPTS, ANSWERS))
    assert all(torch.equal(one, other) for one, other in zip(again, frozen, strict=True))
    save_merged(backbone, own, tmp_path / "merged")
    loaded = AUTO[backbone.kind].from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert_close(outputs_of(loaded, backbone), merged, 1e-5)


@pytest.mark.parametrize("family", ["DeBERTa-v2"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_of_layers_that_rows_share_is_refused_for_that_reason(backbone, tmp_path, moods):
    plain = transformers.AutoModel.from_pretrained(backbone.model.config._name_or_path)
    config = LoraConfig(r=2, target_modules=["query_proj", "key_proj", "value_proj"])
    get_peft_model(plain, config).save_pretrained(tmp_path / "adapter")
    model = ScalableLM.create(
        tmp_path / "store", backbone, Config(retrieval=RetrievalConfig(has_background=False))
    )
    with pytest.raises(
        IncrementError, match=r"all rows share.*: train the adapter without key_proj, query_proj"
    ):
        model.import_adapter(tmp_path / "adapter", moods)


@every
@feature("PEFT adapter")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`")
def test_peft_gives_the_outputs_of_an_exported_increment(backbone, tmp_path):
    own = increment(backbone, 1, 0.05)
    write_adapter(tmp_path / "adapter", own, backbone.source)
    fresh = AUTO[backbone.kind].from_pretrained(backbone.model.config._name_or_path, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert_close(outputs_of(loaded, backbone), bent(backbone, own), 1e-4)
