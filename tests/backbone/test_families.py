"""The same invariants for every family of backbones; ``docs/backbones.md`` is made from their outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slm.backbone.backbone import Backbone, BackboneKind
from slm.backbone.decode import prefill, score_labels
from slm.backbone.generate import generate
from slm.backbone.prompts import IGNORED, Batch
from slm.backbone.reparameterize import LearningBinding, Mixture
from slm.backbone.targets import num_features
from slm.config import Config, DecodingConfig, IncrementConfig, LearningConfig, RetrievalConfig
from slm.errors import ConfigError
from slm.increments.increment import Increment, LowRankPair
from slm.learning.objectives import answer_objective
from slm.model import ScalableLM
from slm.tasks import Task
from tests.backbone.families import FAMILIES, NUM_BLOCKS, load

PRETRAINED = {"MiniLM": "encoder", "SmolLM2": "causal", "small T5": "sequence-to-sequence"}
"""Real weights: a BERT, a LLaMA, and a T5 trained on packaged texts."""
KINDS = {**{name: family.kind for name, family in FAMILIES.items()}, **PRETRAINED}
WRITERS = [name for name, kind in KINDS.items() if kind != "encoder"]

PROMPTS = [
    "Shares rose.",
    "The striker scored twice in the second half before the rain stopped the match for good.",
    "Which minister resigned after the vote on Monday evening?",
]
ANSWERS = ["business", "sport, of course", "none"]

every = pytest.mark.parametrize("family", list(KINDS))
every_writer = pytest.mark.parametrize("family", WRITERS)
feature = pytest.mark.feature


def batch_of(backbone: Backbone, prompts: Sequence[str], answers: Sequence[str] | None = None) -> Batch:
    targets = answers or [None] * len(prompts)
    if backbone.kind is BackboneKind.ENCODER:
        targets = [None] * len(prompts)
    return backbone.batch(
        [backbone.row(p, y, is_truncating=False, where="row") for p, y in zip(prompts, targets, strict=True)]
    )


def outputs(backbone: Backbone, batch: Batch) -> list[Tensor]:
    """Per row, what the backbone gives at the positions that count: hidden states or logits."""
    with torch.no_grad():
        found = backbone.model(**backbone.inputs(batch))
    if backbone.kind is BackboneKind.ENCODER:
        return [hidden[mask] for hidden, mask in zip(found.last_hidden_state, batch.mask, strict=True)]
    marks = batch.mask if backbone.kind is BackboneKind.CAUSAL else batch.targets != IGNORED
    return [logits[mark] for logits, mark in zip(found.logits, marks, strict=True)]


def increment(backbone: Backbone, seed: int, size: float = 0.3) -> Increment:
    """A random increment on every layer that can be re-parameterized."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name in backbone.targets("all-linear", 0):
        num_in, num_out = num_features(backbone.reparameterizer.layers[name].base)
        A = torch.randn(4, num_in, generator=generator) * num_in**-0.5
        pairs[name] = LowRankPair(A, size * torch.randn(num_out, 4, generator=generator))
    return Increment(pairs, 4, 4.0)


def mixture(backbone: Backbone) -> Mixture:
    """Three rows that bend apart: two increments, one of them, none."""
    size = 0.3 if len(backbone.reparameterizer.layers) < 100 else 0.05
    increments = [increment(backbone, seed, size) for seed in (1, 2)]
    return Mixture(
        increments,
        torch.tensor([[0, 1], [1, 0], [0, 0]]),
        torch.tensor([[0.7, 0.3], [1.0, 0.0], [0.0, 0.0]]),
    )


def rows_of(whole: Mixture, rows: Sequence[int]) -> Mixture:
    return Mixture(whole.increments, whole.slots[list(rows)], whole.weights[list(rows)])


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    """Equal up to a share of the largest value: float32 sums in another order."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance * max(1.0, float(other.abs().max())), rtol=0)


@every
@feature("layers found")
def test_every_linear_layer_and_the_attention_outputs_are_found_by_name(family, backbone):
    if family == "MiniLM":
        assert len(backbone.targets("all-linear", 0)) == 36
        assert backbone.targets("attention-output", 5) == ["encoder.layer.5.attention.output.dense"]
    elif family == "SmolLM2":
        assert len(backbone.targets("all-linear", 0)) == 210
        assert backbone.targets("attention-output", 29) == ["model.layers.29.self_attn.o_proj"]
    else:
        wanted = FAMILIES["T5" if family == "small T5" else family]
        assert backbone.kind.value == wanted.kind
        for which, layers in (("all-linear", wanted.layers), ("attention-output", wanted.outputs)):
            names = [
                f"{stack}.{i}.{layer}"
                for stack, own in zip(wanted.stacks, layers, strict=True)
                for i in range(NUM_BLOCKS)
                for layer in own
            ]
            assert sorted(backbone.targets(which, 0)) == sorted(names)
            later = {n for n in names if not n.startswith((f"{wanted.stacks[0]}.0", f"{wanted.stacks[0]}.1"))}
            assert set(backbone.targets(which, 2)) == later
        assert not {n.split(".", 3)[-1] for n in names} & set(wanted.frozen)


@every
@feature("zero increment exact")
def test_a_zero_increment_equals_the_backbone_to_the_bit(backbone):
    batch = batch_of(backbone, PROMPTS, ANSWERS)
    frozen = outputs(backbone, batch)
    backbone.reparameterizer.bind(replace(mixture(backbone), increments=[increment(backbone, 1, 0.0)] * 2))
    bent = outputs(backbone, batch)
    backbone.reparameterizer.release()
    assert all(torch.equal(one, other) for one, other in zip(bent, frozen, strict=True))


@every
@feature("increment = full weight change")
def test_an_increment_does_what_its_full_weight_change_does(backbone):
    batch = batch_of(backbone, PROMPTS, ANSWERS)
    frozen = outputs(backbone, batch)
    own = mixture(backbone).increments[0]
    backbone.reparameterizer.bind(
        Mixture([own], torch.zeros(len(PROMPTS), 1, dtype=torch.long), torch.ones(len(PROMPTS), 1))
    )
    bent = outputs(backbone, batch)
    backbone.reparameterizer.release()
    kept = {}
    try:
        for name, pair in own.pairs.items():
            weight = backbone.reparameterizer.layers[name].weight
            kept[name] = weight.clone()
            change = own.scale * pair.B @ pair.A
            # Conv1D keeps its weight the other way round.
            is_conv = type(backbone.reparameterizer.layers[name].base).__name__ == "Conv1D"
            weight.add_(change.T if is_conv else change)
        formed = outputs(backbone, batch)
    finally:
        for name, weight in kept.items():
            backbone.reparameterizer.layers[name].weight.copy_(weight)
    assert_close(bent, formed, 1e-4)
    assert not torch.allclose(bent[0], frozen[0], atol=1e-2)


def check_each_row_alone(backbone: Backbone, tolerance: float) -> None:
    """Rows of a mixed batch get what they get alone, where the kernel adds instead of batched products."""
    whole = mixture(backbone)
    backbone.reparameterizer.bind(whole)
    together = outputs(backbone, batch_of(backbone, PROMPTS, ANSWERS))
    alone = []
    for i in range(len(PROMPTS)):
        backbone.reparameterizer.bind(rows_of(whole, [i]))
        alone += outputs(backbone, batch_of(backbone, PROMPTS[i : i + 1], ANSWERS[i : i + 1]))
    backbone.reparameterizer.release()
    assert_close(together, alone, tolerance)
    frozen = outputs(backbone, batch_of(backbone, PROMPTS, ANSWERS))
    assert not torch.allclose(together[0], frozen[0], atol=1e-2)
    assert_close(together[2:], frozen[2:])  # the row that abstains


@every
@feature("mixed batch = each row alone")
def test_a_row_of_a_mixed_batch_gets_what_it_gets_alone(family, backbone):
    check_each_row_alone(backbone, tolerance=2e-5)


@every_writer
@feature("mixed batch = each row alone")
def test_a_row_of_a_mixed_batch_writes_the_tokens_it_writes_alone(backbone):
    whole = mixture(backbone)
    backbone.reparameterizer.bind(whole)
    together = generate(backbone, prefill(backbone, batch_of(backbone, PROMPTS)), range(3), 8)
    for i, (answer,) in enumerate(together):
        backbone.reparameterizer.bind(rows_of(whole, [i]))
        alone = generate(backbone, prefill(backbone, batch_of(backbone, PROMPTS[i : i + 1])), [0], 8)[0][0]
        assert alone.text == answer.text
        assert alone.confidence == pytest.approx(answer.confidence, abs=1e-4)
    backbone.reparameterizer.release()


@every
@feature("padding")
def test_padding_changes_nothing(backbone):
    whole = mixture(backbone)
    backbone.reparameterizer.bind(rows_of(whole, [0]))
    alone = outputs(backbone, batch_of(backbone, PROMPTS[:1], ANSWERS[:1]))
    sides = ("left", "right") if backbone.kind is BackboneKind.CAUSAL else ("right",)
    for side in sides:
        rows = [
            backbone.row(
                p, None if backbone.kind is BackboneKind.ENCODER else y, is_truncating=False, where=""
            )
            for p, y in zip(PROMPTS[:2], ANSWERS[:2], strict=True)
        ]
        backbone.reparameterizer.bind(rows_of(whole, [0, 1]))
        padded = outputs(backbone, backbone.renderer.batch(rows, side).to(backbone.device))
        assert_close(padded[:1], alone)
    backbone.reparameterizer.release()


@every
@feature("query, two passes")
def test_the_frozen_pass_reads_the_same_query_whatever_is_bound_above_or_beside(backbone):
    batch = batch_of(backbone, PROMPTS)
    parts = [(layer, pooling) for layer in (0, 1, backbone.num_layers) for pooling in ("mean", "first")]
    together = backbone.queries(batch, parts)
    assert together.shape == (3, len(parts) * backbone.num_channels)
    assert float(together.std(0).min()) > 0  # every channel tells rows apart
    for i, prompt in enumerate(PROMPTS):
        assert_close(backbone.queries(batch_of(backbone, [prompt]), parts), together[i : i + 1])


@every
@feature("query, one pass")
def test_the_query_is_read_inside_the_pass_that_it_bends(backbone):
    batch = batch_of(backbone, PROMPTS, ANSWERS)
    asked = batch_of(backbone, PROMPTS)
    whole = mixture(backbone)
    above = set(backbone.targets("all-linear", 1))
    higher = [
        Increment({n: p for n, p in x.pairs.items() if n in above}, x.rank, x.alpha) for x in whole.increments
    ]
    read: list[Tensor] = []

    def decide(query: Tensor) -> None:
        read.append(query)
        backbone.reparameterizer.bind(replace(whole, increments=higher))

    expected = backbone.queries(asked, [(1, "mean")])
    with backbone.reading_query(asked, [(1, "mean")], decide):
        inside = outputs(backbone, asked) if backbone.kind is BackboneKind.ENCODER else None
        start = prefill(backbone, asked) if inside is None else None
        if start is not None:
            generate(backbone, start, range(3), 2)  # decoding decides nothing anew
    assert len(read) == 1
    assert_close(read, [expected])
    backbone.reparameterizer.bind(replace(whole, increments=higher))
    if inside is not None:
        assert_close(inside, outputs(backbone, batch))
    else:
        assert_close([start.logits], [prefill(backbone, asked).logits])
    backbone.reparameterizer.release()


@every
@feature("gradients")
def test_gradients_reach_the_increment_and_nothing_else(backbone):
    seed = torch.Generator().manual_seed(0)
    layers = backbone.reparameterizer.layers
    names = backbone.targets("all-linear", 0)
    learning = {n: LearningBinding(layers[n].base, 2, 2.0, 0.0, seed) for n in names}
    batch = batch_of(backbone, PROMPTS, ANSWERS)
    frozen = outputs(backbone, batch)
    backbone.reparameterizer.bind_each(learning)
    born = outputs(backbone, batch)
    assert all(torch.equal(one, other) for one, other in zip(born, frozen, strict=True))
    with torch.no_grad():
        for binding in learning.values():
            binding.B.normal_(0.0, 0.02, generator=seed)
    with backbone.learning_attention():
        if backbone.kind is BackboneKind.ENCODER:
            backbone.pooled(batch).square().sum().backward()
        else:
            answer_objective(backbone, batch).loss.backward()
    backbone.reparameterizer.release()
    assert all(parameter.grad is None for parameter in backbone.model.parameters())
    for name, binding in learning.items():
        assert float(binding.A.grad.abs().sum()) > 0, name
        assert float(binding.B.grad.abs().sum()) > 0, name


def settings(num_passes: int) -> Config:
    return Config(
        increments=IncrementConfig(rank=2, alpha=4.0),
        retrieval=RetrievalConfig(layers=(1,), num_passes=num_passes, is_abstaining=False),
        learning=LearningConfig(num_epochs=1, batch_size=8, has_progress=False),
    )


@every
@feature("learn, save, load")
def test_what_is_learned_is_read_back_to_the_same_logits(family, backbone, folder_of, tmp_path):
    rows = [{"text": f"{p} {n}", "label": y} for n in range(4) for p, y in zip(PROMPTS, "abc", strict=True)]
    model = ScalableLM.create(tmp_path / "store", backbone, settings(1 if family == "SmolLM2" else 2))
    model.learn(Task.from_rows("letters", rows))
    fresh = backbone if family in ("MiniLM", "SmolLM2") else load(folder_of(family))
    again = ScalableLM.open(tmp_path / "store", fresh)
    found = []
    for other in (model, again):
        assert [record.name for record in other.tasks] == ["letters"]
        batch = batch_of(other.backbone, PROMPTS)
        with other._adapting(other.knowledge, batch, PROMPTS):
            if other.backbone.kind is not BackboneKind.ENCODER:
                prefill(other.backbone, batch)  # where the query is read in the pass, this pass decides
            assert any(layer.binding is not None for layer in other.backbone.reparameterizer.layers.values())
            found.append(outputs(other.backbone, batch_of(other.backbone, PROMPTS, ANSWERS)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert model.ask(PROMPTS, max_new_tokens=8) == again.ask(PROMPTS, max_new_tokens=8)
    assert {answer.text for answer in again.ask(PROMPTS, max_new_tokens=8)} <= set("abc")


def by_hand(backbone: Backbone, prompt: str, num_tokens: int) -> tuple[str, float]:
    """Greedy text and confidence without any cache: the whole row again for every token."""
    tokenizer = backbone.renderer.tokenizer
    (row,) = [backbone.row(prompt, is_truncating=False, where="row")]
    written: list[int] = []
    log_probs = []
    while len(written) < num_tokens and tokenizer.eos_token_id not in written:
        if backbone.kind is BackboneKind.CAUSAL:
            batch = backbone.batch([replace(row, prompt=row.prompt + tuple(written))])
            inputs = backbone.inputs(batch)
        else:
            inputs = backbone.inputs(backbone.batch([replace(row, target=(*written, 0))]))
        with torch.no_grad():
            logits = backbone.model(**inputs, use_cache=False).logits[0, -1]
        written.append(int(logits.argmax()))
        log_probs.append(logits.log_softmax(-1).max())
    text = tokenizer.decode(written, skip_special_tokens=True).strip()
    return text, float(torch.stack(log_probs).mean().exp())


@every_writer
@feature("cached generation")
def test_writing_with_the_cache_equals_writing_without(backbone):
    whole = mixture(backbone)
    backbone.reparameterizer.bind(whole)
    found = generate(backbone, prefill(backbone, batch_of(backbone, PROMPTS)), [2, 0, 1], 10)
    for i, (answer,) in zip((2, 0, 1), found, strict=True):
        backbone.reparameterizer.bind(rows_of(whole, [i]))
        text, confidence = by_hand(backbone, PROMPTS[i], 10)
        assert answer.text == text
        assert answer.confidence == pytest.approx(confidence, abs=1e-4)
    backbone.reparameterizer.release()


@every_writer
@feature("label words")
def test_labels_are_scored_as_each_text_run_alone(backbone):
    whole = mixture(backbone)
    backbone.reparameterizer.bind(whole)
    labels = [["business", "sports and games", "a"], ["politics", "tech"], ["x"]]
    start = prefill(backbone, batch_of(backbone, PROMPTS))
    rows = [1, 0, 2]
    for i, texts, scores in zip(rows, labels, score_labels(backbone, start, rows, labels), strict=True):
        backbone.reparameterizer.bind(rows_of(whole, [i]))
        slow = []
        for text in texts:
            batch = batch_of(backbone, [PROMPTS[i]], [text])
            with torch.no_grad():
                log_probs = backbone.model(**backbone.inputs(batch)).logits.log_softmax(-1)[0]
            counted = batch.targets[0] != IGNORED
            slow.append(log_probs[counted].gather(1, batch.targets[0][counted][:, None]).sum())
        backbone.reparameterizer.bind(whole)
        torch.testing.assert_close(scores, torch.stack(slow), atol=1e-4, rtol=1e-4)
    backbone.reparameterizer.release()


@every_writer
@feature("beam search")
def test_beams_of_a_mixed_batch_are_those_of_each_row_alone(backbone, monkeypatch):
    whole = mixture(backbone)
    decoding = DecodingConfig(num_beams=3, num_sequences=2)
    backbone.reparameterizer.bind(whole)
    together = generate(backbone, prefill(backbone, batch_of(backbone, PROMPTS)), range(3), 6, decoding)
    for i, answers in enumerate(together):
        assert len(answers) == 2
        backbone.reparameterizer.bind(rows_of(whole, [i]))
        batch = batch_of(backbone, PROMPTS[i : i + 1])
        start = batch.ids.shape[1] if backbone.kind is BackboneKind.CAUSAL else 1
        # Transformers alone, from the whole prompt; tiny BART forces an end token, which slm does not.
        monkeypatch.setattr(backbone.model.generation_config, "forced_eos_token_id", None)
        with torch.no_grad():
            sequences = backbone.model.generate(
                input_ids=batch.ids,
                attention_mask=batch.mask.long(),
                num_beams=3,
                num_return_sequences=2,
                max_new_tokens=6,
                do_sample=False,
                pad_token_id=backbone.renderer.pad_id,
                eos_token_id=backbone.renderer.tokenizer.eos_token_id,
            )
        decode = backbone.renderer.tokenizer.decode
        texts = [decode(ids[start:], skip_special_tokens=True).strip() for ids in sequences]
        assert [answer.text for answer in answers] == texts
        assert 1 >= answers[0].confidence >= answers[1].confidence > 0
    backbone.reparameterizer.release()


@every_writer
@feature("several samples")
def test_samples_of_a_row_keep_its_mixture(backbone):
    backbone.reparameterizer.bind(mixture(backbone))
    start = prefill(backbone, batch_of(backbone, PROMPTS))
    greedy = generate(backbone, start, range(3), 6)
    cold = generate(
        backbone, start, range(3), 6, DecodingConfig(temperature=1.0, top_p=1e-3, num_sequences=3)
    )
    assert [[x.text for x in row] for row in cold] == [[row[0].text] * 3 for row in greedy]
    warm = DecodingConfig(temperature=3.0, num_sequences=3, top_p=0.9)
    one, two = (generate(backbone, start, range(3), 6, warm) for _ in range(2))
    other = generate(backbone, start, range(3), 6, replace(warm, seed=1))
    backbone.reparameterizer.release()
    assert one == two != other
    assert all(len({x.text for x in row}) > 1 for row in one)


@every_writer
@feature("assisted generation")
@pytest.mark.parametrize("name", ["assistant_model", "prompt_lookup_num_tokens"])
def test_assisted_generation_is_refused_by_name(backbone, name, record_property):
    record_property("outcome", "refused")
    with pytest.raises(
        ConfigError, match=rf"^DecodingConfig: {name} asks for assisted generation, .* refused"
    ):
        DecodingConfig(**{name: backbone.model if name == "assistant_model" else 3})
    assert backbone.model.generation_config.prompt_lookup_num_tokens is None
