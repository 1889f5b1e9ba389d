"""Causal models that count positions themselves or see by own rules: right all the same, or refused."""

from __future__ import annotations

import pytest
import torch
import transformers

from slm.backbone import trial
from slm.backbone.backbone import BackboneKind
from slm.backbone.backbone import _window as window_of
from slm.backbone.decode import prefill
from slm.backbone.slots import ApartSlots, Slots, slots_of
from slm.errors import BackboneError, ConfigError
from tests.backbone import test_families as floats
from tests.backbone.families import (
    APART,
    DEEPER,
    FAMILIES,
    REFUSED,
    TEMPLATES,
    WINDOW,
    WRAPPED,
    load,
    tokenizer,
)
from tests.backbone.test_families import PROMPTS, batch_of, mixture, rows_of

apart = pytest.mark.parametrize("family", list(APART))
wrapped = pytest.mark.parametrize("family", list(WRAPPED))
WRITERS = [name for name, family in FAMILIES.items() if family.kind != "encoder"]


@apart
def test_labels_texts_and_beams_are_those_of_each_row_alone(backbone, monkeypatch):
    assert backbone.is_reading_apart
    floats.test_labels_are_scored_as_each_text_run_alone(backbone)
    floats.test_writing_with_the_cache_equals_writing_without(backbone)
    floats.test_beams_of_a_mixed_batch_are_those_of_each_row_alone(backbone, monkeypatch)


@pytest.mark.parametrize("family", [*APART, *WRAPPED, *WRITERS])
def test_rows_that_come_and_go_get_the_logits_of_their_whole_text(family, backbone):
    whole = mixture(backbone)
    backbone.reparameterizer.bind(whole)
    start = prefill(backbone, batch_of(backbone, PROMPTS))
    slots, lines = slots_of(backbone), [0, 2]
    assert isinstance(slots, ApartSlots) == backbone.is_reading_apart
    for row in lines:
        slots.admit(start, row)
    written: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for step in range(6):
        if step == 2:
            slots.admit(start, 1)
            lines.append(1)
        if step == 4:
            slots.remove(0)
            lines = [1, 2]
        tokens = [17 + 5 * step + row for row in lines]
        for row, token in zip(lines, tokens, strict=True):
            written[row].append(token)
        backbone.reparameterizer.bind(rows_of(whole, lines))
        logits = slots.step(torch.tensor(tokens))
        for place, row in enumerate(lines):
            backbone.reparameterizer.bind(rows_of(whole, [row]))
            floats.assert_close([logits[place]], [whole_text(backbone, PROMPTS[row], written[row])], 2e-5)
    backbone.reparameterizer.release()


def whole_text(backbone, prompt: str, written: list[int]) -> torch.Tensor:
    """Logits behind a prompt and what was written, without a cache."""
    row = backbone.row(prompt, is_truncating=False, where="row")
    if backbone.kind is BackboneKind.CAUSAL:
        row = floats.replace(row, prompt=(*row.prompt, *written))
    else:
        row = floats.replace(row, target=(*written, 0))
    with torch.no_grad():
        return backbone.model(**backbone.inputs(backbone.batch([row])), use_cache=False).logits[0, -1]


@wrapped
def test_a_text_model_inside_another_is_read_like_any_other(family, backbone, folder_of, tmp_path):
    assert (backbone.num_channels, backbone.window, backbone.num_layers) == (32, 128, 3)
    assert not backbone.is_reading_apart
    floats.test_labels_are_scored_as_each_text_run_alone(backbone)
    floats.test_writing_with_the_cache_equals_writing_without(backbone)
    floats.test_the_frozen_pass_reads_the_same_query_whatever_is_bound_above_or_beside(backbone)
    floats.test_gradients_reach_the_increment_and_nothing_else(backbone)
    floats.test_what_is_learned_is_read_back_to_the_same_logits(family, backbone, folder_of, tmp_path)


@pytest.mark.parametrize("family", list(DEEPER))
def test_a_decoder_deeper_than_the_encoder_writes_as_any_other(backbone):
    assert backbone.model.config.num_decoder_layers > backbone.model.config.num_layers
    floats.test_labels_are_scored_as_each_text_run_alone(backbone)
    floats.test_writing_with_the_cache_equals_writing_without(backbone)
    floats.test_samples_of_a_row_keep_its_mixture(backbone)


def test_the_window_is_read_by_whichever_name_it_has(folder_of):
    assert load(folder_of("MPT")).window == 128


@pytest.mark.parametrize("rope_type", ["longrope", "default"])
def test_positions_that_a_long_row_changes_for_its_batch_end_the_window(rope_type):
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 32}
    rope = {"rope_type": rope_type, "rope_theta": 10_000.0, **(factors if rope_type == "longrope" else {})}
    config = transformers.Phi3Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        original_max_position_embeddings=32,
        vocab_size=100,
        pad_token_id=0,
        rope_parameters=rope,
    )
    assert window_of(transformers.Phi3ForCausalLM(config)) == (32 if rope_type == "longrope" else 128)


@pytest.mark.parametrize("family", WRITERS)
def test_attention_by_mask_and_position_is_read_side_by_side(family, backbone):
    assert backbone.is_reading_apart == (backbone.kind is BackboneKind.SEQUENCE_TO_SEQUENCE)
    assert isinstance(slots_of(backbone), Slots) != backbone.is_reading_apart


@pytest.mark.parametrize("family", ["BLOOM", "MPT", "Falcon with ALiBi"])
def test_the_trial_sees_positions_of_its_own_where_no_description_tells_of_them(
    folder_of, family, monkeypatch
):
    monkeypatch.setattr(trial, "_is_known", lambda model: True)
    assert load(folder_of(family)).is_reading_apart


@pytest.mark.parametrize("family", ["GPT-Neo", "Llama 4"])
def test_rows_are_longer_than_what_a_local_layer_sees(family, backbone):
    assert max(len(backbone.row(p, is_truncating=False, where="row").prompt) for p in PROMPTS) > WINDOW


@pytest.mark.parametrize("family", list(REFUSED))
def test_a_model_that_keeps_no_keys_and_values_is_refused_by_name(family, folder_of):
    name = REFUSED[family].model
    with pytest.raises(BackboneError, match=rf"is a {name}, which keeps something else than keys and values"):
        load(folder_of(family))


def test_a_type_of_several_models_is_refused_by_name(tmp_path):
    config = transformers.FunnelConfig(
        block_sizes=[1], d_model=8, n_head=2, d_head=4, d_inner=8, vocab_size=1000
    )
    transformers.FunnelModel(config).save_pretrained(tmp_path)
    tokenizer(TEMPLATES["encoder"]).save_pretrained(tmp_path)
    with pytest.raises(
        BackboneError, match=r"^backbone type 'funnel' may be a FunnelModel or FunnelBaseModel,"
    ):
        load(tmp_path)


@pytest.mark.parametrize("family", ["LLaMA"])
def test_an_answer_of_no_tokens_is_refused(backbone):
    with pytest.raises(ConfigError, match=r"^max_new_tokens must be at least 1, got 0: raise it$"):
        backbone.check_room([], 0)


@pytest.mark.parametrize("family", ["LLaMA"])
def test_a_slot_without_weight_may_have_any_value(backbone):
    whole, batch = mixture(backbone), batch_of(backbone, PROMPTS)
    found = []
    for slots in (whole.slots, whole.slots.masked_fill(whole.weights == 0, 9)):
        backbone.reparameterizer.bind(floats.replace(whole, slots=slots))
        found.append(floats.outputs(backbone, batch))
    backbone.reparameterizer.release()
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
