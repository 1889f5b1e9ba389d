"""Knowledge that leaves a store and comes into one: through PEFT, transformers and merged weights."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from slm.backbone.load import load_backbone
from slm.config import BackboneConfig, Config, IncrementConfig, LearningConfig, RetrievalConfig
from slm.errors import BackboneError, ConfigError, DataError, IncrementError, StoreError, TaskError
from slm.model import ScalableLM
from slm.tasks import Task
from tests.backbone.families import TEMPLATES, VOCABULARY, tokenizer

# PEFT asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TEXTS = ["what is 4 plus 5?", "i loved it!", "a cold mess", "où est la gare"]


def settings(**retrieval) -> Config:
    return Config(
        backbone=BackboneConfig(dtype="float32", max_tokens=128),
        learning=LearningConfig(num_epochs=2, has_progress=False),
        retrieval=RetrievalConfig(**retrieval),
    )


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def batch_of(backbone, texts=TEXTS):
    return backbone.batch([backbone.row(text, is_truncating=False, where="row") for text in texts])


def outputs(backbone, model, texts=TEXTS):
    """Logits of a causal model, last hidden states of an encoder."""
    batch = batch_of(backbone, texts)
    with torch.no_grad():
        found = model(**backbone.inputs(batch))
    return (found.logits if hasattr(found, "logits") else found.last_hidden_state)[batch.mask]


def bound_outputs(model, weights):
    """The same of an slm model with a fixed mixture bound to it, by the layers' own arithmetic."""
    from slm.backbone.reparameterize import Mixture

    records = [model.store.task(name) for name in weights]
    rows = len(TEXTS)
    slots = torch.arange(len(records)).repeat(rows, 1)
    shares = torch.tensor(list(weights.values())).repeat(rows, 1)
    increments = [model.store.increment(record, 0) for record in records]
    model.backbone.reparameterizer.bind(Mixture(increments, slots, shares))
    try:
        return outputs(model.backbone, model.backbone.model)
    finally:
        model.backbone.reparameterizer.release()


def same_answers(found, expected):
    assert [a.text for a in found] == [a.text for a in expected]
    assert [a.tasks for a in found] == [a.tasks for a in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.confidence == pytest.approx(b.confidence, abs=1e-4)


@pytest.fixture(params=["encoder", "causal"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def unmerging(model):
    yield model
    model.unmerge()


def test_a_merged_model_answers_as_the_one_that_knows_only_this_task_and_unmerging_leaves_no_trace(unmerging):
    model = unmerging
    before = copy.deepcopy(model.backbone.model.state_dict())
    answers = model.ask(TEXTS, max_new_tokens=6)
    oracle = model.restricted(["moods"], is_abstaining=False).ask(TEXTS, max_new_tokens=6)
    model.merge("moods")
    merged = model.ask(TEXTS, max_new_tokens=6)
    same_answers(merged, oracle)
    assert all(answer.tasks == (("moods", 1.0),) and not answer.is_abstained for answer in merged)
    model.unmerge()
    after = model.backbone.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert model.ask(TEXTS, max_new_tokens=6) == answers


def test_an_adapter_is_imported_where_only_attention_outputs_can_be_bent(tmp_path):
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "ffn_dim": 48, "num_attention_heads": 4}
    config = OPTConfig(
        **shape, vocab_size=VOCABULARY, max_position_embeddings=128, word_embed_proj_dim=32, pad_token_id=0
    )
    OPTForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer(TEMPLATES["causal"]).save_pretrained(tmp_path / "model")
    loading = BackboneConfig(dtype="float32", device="cpu", max_tokens=64)
    settings = Config(backbone=loading, increments=IncrementConfig(targets="attention-output"))
    model = ScalableLM.create(tmp_path / "store", str(tmp_path / "model"), settings)
    own = OPTForCausalLM.from_pretrained(tmp_path / "model")
    lora = LoraConfig(target_modules=["out_proj"], r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(own, lora).save_pretrained(tmp_path / "adapter")
    rows = [{"prompt": f"say number {i}", "completion": f"it is {i}"} for i in range(12)]
    report = model.import_adapter(tmp_path / "adapter", Task.from_rows("numbers", rows))
    assert (report.rank, report.num_layers) == (4, 3)
    assert model.ask("say number 5", max_new_tokens=2)[0].tasks == (("numbers", 1.0),)


def test_a_merged_mixture_names_its_tasks_by_weight(encoder):
    encoder.merge({"moods": 0.25, "languages": 0.75})
    try:
        answers = encoder.ask(TEXTS)
        assert {answer.tasks for answer in answers} == {(("languages", 0.75), ("moods", 0.25))}
        assert {answer.text for answer in answers} <= {"french", "german", "good", "bad"}
    finally:
        encoder.unmerge()


def test_while_merged_whatever_takes_the_frozen_weights_is_refused(encoder, languages, tmp_path):
    other = ScalableLM.create(tmp_path / "other", encoder.backbone, encoder.config)
    encoder.merge("moods")
    try:
        for act in (
            lambda: encoder.explain("a cold mess"),
            lambda: encoder.retrieve(["a cold mess"]),
            lambda: encoder.learn(languages),
            lambda: encoder.evaluate(None),
            lambda: encoder.export("moods", tmp_path / "out"),
            lambda: encoder.import_adapter(tmp_path, languages),
            lambda: encoder.merge("languages"),
        ):
            with pytest.raises(BackboneError, match=r"moods is merged into the weights, .*: unmerge first"):
                act()
        with pytest.raises(TaskError, match=r"task 'moods' is merged into the weights: unmerge before"):
            encoder.forget("moods")
        with pytest.raises(
            BackboneError, match=r"a task is merged into backbone 'minilm': unmerge it before"
        ):
            ScalableLM.create(tmp_path / "new", encoder.backbone)
        assert not (tmp_path / "new").exists()
        for stranger in (other, encoder.restricted(["moods"])):
            with pytest.raises(BackboneError, match=r"another model has merged a task into backbone"):
                stranger.ask("a cold mess")
        other.unmerge()  # not its own: nothing happens
        assert encoder.ask("a cold mess")[0].tasks == (("moods", 1.0),)
    finally:
        encoder.unmerge()
    assert encoder.explain("a cold mess").candidates


@pytest.mark.parametrize(
    ("tasks", "error", "said"),
    [
        ("mods", TaskError, "did you mean moods"),
        ([], TaskError, "at least one and each once"),
        (["moods", "moods"], TaskError, "at least one and each once"),
        (
            {"moods": 0.5, "languages": 0.6},
            ConfigError,
            "above 0 with the sum 1, got moods=0.5, languages=0.6",
        ),
        ({"moods": 1.5, "languages": -0.5}, ConfigError, "above 0 with the sum 1"),
        ({"moods": "all"}, ConfigError, "above 0 with the sum 1, got moods='all'"),
        ({"moods": float("nan")}, ConfigError, "above 0 with the sum 1, got moods=nan"),
    ],
)
def test_mixtures_that_cannot_be_meant_are_refused(encoder, tmp_path, tasks, error, said):
    for act in (encoder.merge, lambda tasks: encoder.export(tasks, tmp_path / "out")):
        with pytest.raises(error, match=said):
            act(tasks)
    assert list(tmp_path.iterdir()) == []


def plain_backbone(model):
    """The backbone's own transformers model, loaded anew without slm."""
    auto = AutoModel if model.backbone.kind.value == "encoder" else AutoModelForCausalLM
    return auto.from_pretrained(model.backbone.model.config._name_or_path, dtype=torch.float32).eval()


@pytest.mark.parametrize("is_mixture", [False, True])
def test_peft_gives_the_logits_of_an_exported_task_or_mixture(model, tmp_path, is_mixture):
    names = [record.name for record in model.tasks]
    weights = dict(zip(names, (0.7, 0.3), strict=True)) if is_mixture else {"moods": 1.0}
    files = model.export(weights, tmp_path / "out")
    assert {"adapter_config.json", "adapter_model.safetensors", "slm.json"} <= set(files)
    plain = plain_backbone(model)
    loaded = PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    found, expected = outputs(model.backbone, loaded), bound_outputs(model, weights)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    rank = sum(model.store.increment(model.store.task(name), 0).rank for name in weights)
    assert loaded.peft_config["default"].r == rank
    notes = json.loads((tmp_path / "out" / "slm.json").read_text())
    assert {task["name"]: task["weight"] for task in notes["tasks"]} == weights
    for task in notes["tasks"]:
        own = model.store.head(model.store.task(task["name"]))
        assert (task["head"] is None) == (own is None)
        if own is not None:
            stored = load_file(tmp_path / "out" / task["head"])
            assert all(torch.equal(stored[name], tensor) for name, tensor in own.items())


def test_transformers_loads_a_merged_export_and_gives_the_same_logits(model, tmp_path):
    before = copy.deepcopy(model.backbone.model.state_dict())
    files = model.export("moods", tmp_path / "out", is_merged=True)
    assert {"config.json", "model.safetensors", "tokenizer.json", "slm.json"} <= set(files)
    after = model.backbone.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    auto = AutoModel if model.backbone.kind.value == "encoder" else AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    expected = bound_outputs(model, {"moods": 1.0})
    found = outputs(model.backbone, loaded)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(TEXTS)["input_ids"] == model.backbone.renderer.tokenizer(TEXTS)["input_ids"]
    again = load_backbone(str(tmp_path / "out"), BackboneConfig(dtype="float32"))
    assert again.kind is model.backbone.kind


def test_an_encoders_merged_export_names_labels_with_its_head(encoder, tmp_path):
    """The few lines that docs/adapters.md gives."""
    encoder.export("moods", tmp_path / "out", is_merged=True)
    labels = json.loads((tmp_path / "out" / "slm.json").read_text())["tasks"][0]["labels"]
    head = load_file(tmp_path / "out" / "head.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    plain = AutoModel.from_pretrained(tmp_path / "out", add_pooling_layer=False).eval()
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = plain(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    shares = (pooled @ head["weight"].T + head["bias"]).softmax(-1)
    expected = encoder.restricted(["moods"], is_abstaining=False).ask(TEXTS)
    assert [labels[i] for i in shares.argmax(-1)] == [answer.text for answer in expected]
    assert shares.max(-1).values.tolist() == pytest.approx([a.confidence for a in expected], abs=1e-5)


def test_an_export_goes_into_a_new_folder_or_nowhere(encoder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "file").touch()
    for taken in ("full", "file"):
        with pytest.raises(StoreError, match=r"exists and is not empty: choose a new folder"):
            encoder.export("moods", tmp_path / taken)
    with pytest.raises(StoreError, match=r"nothing can be written at .*: choose another folder"):
        encoder.export("moods", tmp_path / "file" / "below")
    (tmp_path / "empty").mkdir()
    encoder.export("moods", tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]


def test_an_export_that_breaks_off_leaves_nothing(encoder, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    before = copy.deepcopy(encoder.backbone.model.state_dict())
    monkeypatch.setattr(type(encoder.backbone.model), "save_pretrained", full)
    with pytest.raises(StoreError, match="No space left on device"):
        encoder.export("moods", tmp_path / "out", is_merged=True)
    assert list(tmp_path.iterdir()) == []
    after = encoder.backbone.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert encoder.ask("a cold mess")[0].tasks


@pytest.mark.parametrize("is_merged", [False, True])
def test_an_export_follows_a_link_and_fills_a_folder_that_cannot_be_replaced(
    encoder, tmp_path, monkeypatch, is_merged
):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    names = encoder.export("moods", tmp_path / "link", is_merged=is_merged)
    assert (tmp_path / "link").is_symlink()
    assert sorted(digests(tmp_path / "real")) == names
    (tmp_path / "mount").mkdir()
    place = (tmp_path / "mount").stat().st_ino
    monkeypatch.setattr(type(tmp_path), "is_mount", lambda self: self.name == "mount")
    assert encoder.export("moods", tmp_path / "mount", is_merged=is_merged) == names
    assert (tmp_path / "mount").stat().st_ino == place
    assert digests(tmp_path / "mount") == digests(tmp_path / "real")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "mount", "real"]


def test_a_mount_point_that_does_not_look_like_one_is_filled_or_left_empty(encoder, tmp_path, monkeypatch):
    def busy(self):
        raise OSError(errno.EBUSY, "Device or resource busy")

    folder = tmp_path / "mount"
    folder.mkdir()
    monkeypatch.setattr(type(tmp_path), "rmdir", busy)
    own, moved = shutil.move, []

    def full(source, target):
        if moved:
            raise OSError(errno.ENOSPC, "No space left on device")
        moved.append(own(source, target))

    with monkeypatch.context() as within:
        within.setattr(shutil, "move", full)
        with pytest.raises(StoreError, match="No space left on device"):
            encoder.export("moods", folder)
    assert moved
    assert list(folder.iterdir()) == []
    assert sorted(digests(folder)) == []
    assert encoder.export("moods", folder) == sorted(digests(folder))
    assert [path.name for path in tmp_path.iterdir()] == ["mount"]


def test_a_restricted_model_exports_merges_and_restricts_the_tasks_it_knows(encoder, tmp_path):
    own = encoder.restricted(["moods"])
    for act in (
        own.merge,
        lambda name: own.restricted([name]),
        lambda name: own.export(name, tmp_path / "out"),
        lambda name: own.export({"moods": 0.5, name: 0.5}, tmp_path / "out"),
    ):
        with pytest.raises(
            TaskError,
            match=r"^no task 'languages' among the 1 that this model is restricted to \(moods\): name one",
        ):
            act("languages")
    assert list(tmp_path.iterdir()) == []
    assert own.restricted(["moods"]).tasks == own.tasks
    own.export("moods", tmp_path / "out")
    encoder.export("moods", tmp_path / "whole")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    with pytest.raises(TaskError, match=r"among the 0 that this model is restricted to \(none\)"):
        encoder.restricted([]).merge("moods")


def test_an_encoders_export_comes_back_and_answers_as_before(encoder, minilm, languages, moods, tmp_path):
    encoder.export("moods", tmp_path / "out")
    other = ScalableLM.create(tmp_path / "store", minilm, encoder.config)
    other.learn(languages)
    report = other.import_adapter(tmp_path / "out", moods)
    assert (report.kind, report.num_examples, report.rank) == ("classification", len(moods.examples), 8)
    texts = [e.prompt for e in moods.examples] + [e.prompt for e in languages.examples]
    found = other.ask(texts)
    own = [a.tasks and a.tasks[0][0] for a in found]
    assert own[: len(moods.examples)].count("moods") >= 0.95 * len(moods.examples)
    oracle = encoder.restricted(["moods"], is_abstaining=False).ask(texts[: len(moods.examples)])
    mine = other.restricted(["moods"], is_abstaining=False).ask(texts[: len(moods.examples)])
    assert [a.text for a in mine] == [a.text for a in oracle]
    assert other.store.check() == []


def trained_by_peft(model, backbone, pairs, settings, num_steps=12) -> PeftModel:
    """An adapter that PEFT trains for a few steps, as anybody would."""
    torch.manual_seed(0)
    adapted = get_peft_model(model, settings)
    rows = [backbone.row(q, a, is_truncating=False, where="row") for q, a in pairs]
    batch = backbone.batch(rows)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(num_steps):
        logits = adapted(**backbone.inputs(batch)).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted.eval()


ANIMALS = [
    (f"which animal says {noise}?", animal)
    for noise, animal in (("moo", "cow"), ("woof", "dog"), ("meow", "cat"))
]


@pytest.fixture(scope="module")
def farm(tmp_path_factory, smollm2):
    """An adapter of SmolLM2 on all of its layers, the first ones included, with logits of its own."""
    folder = tmp_path_factory.mktemp("farm") / "farm"
    plain = AutoModelForCausalLM.from_pretrained(smollm2.model.config._name_or_path, dtype=torch.float32)
    settings = LoraConfig(
        r=4, lora_alpha=8, use_rslora=True, target_modules="all-linear", rank_pattern={"down_proj": 2}
    )
    adapted = trained_by_peft(plain, smollm2, ANIMALS, settings)
    adapted.save_pretrained(folder)
    return folder, outputs(smollm2, adapted)


@pytest.fixture(scope="module")
def farm_task():
    return Task.from_rows("farm", [{"prompt": q, "completion": a} for q, a in ANIMALS])


def test_an_adapter_that_peft_trained_is_imported_routed_to_and_mixed_with_learned_tasks(
    tmp_path, causal, smollm2, sums, farm, farm_task
):
    folder, logits = farm
    shutil.copytree(causal.store.path, tmp_path / "store")
    model = ScalableLM.open(tmp_path / "store", smollm2)
    assert not model.extractor.is_two_pass
    before = digests(tmp_path / "store" / "tasks")
    report = model.import_adapter(folder, farm_task)
    assert (report.task, report.kind, report.rank, report.num_layers) == ("farm", "generation", 4, 210)
    assert before.items() <= digests(tmp_path / "store" / "tasks").items()
    torch.testing.assert_close(bound_outputs(model, {"farm": 1.0}), logits, rtol=0, atol=2e-4)

    both = zip(ANIMALS, sums.examples, strict=False)
    questions = [question for (own, _), other in both for question in (own, other.prompt)]
    names = [record.name for record in model.tasks]
    mixed = model.restricted(names, is_abstaining=False).ask(questions, max_new_tokens=4)
    assert [a.tasks[0][0] for a in mixed] == ["farm", "sums"] * len(ANIMALS)
    assert [a.text for a in mixed[::2]] == [animal for _, animal in ANIMALS]
    again = ScalableLM.open(tmp_path / "store", smollm2).restricted(names, is_abstaining=False)
    alone = [again.ask(question, max_new_tokens=4)[0] for question in questions]
    same_answers(alone, mixed)


def test_an_imported_adapter_that_bends_the_querys_own_layers_is_whole_and_its_keys_are_still_frozen(
    tmp_path, smollm2, farm, farm_task
):
    """In one pass the first layers would run before the decision; its store spends a short pass on it."""
    folder, _ = farm
    model = ScalableLM.create(tmp_path / "store", smollm2, settings(is_abstaining=False))
    model.import_adapter(folder, farm_task)
    assert [record.metadata["needs_two_passes"] for record in model.tasks] == [True]
    batch = batch_of(smollm2)
    with torch.no_grad(), model._adapting(model.knowledge, batch, TEXTS):
        found = smollm2.model(**smollm2.inputs(batch)).logits[batch.mask]
    expected = bound_outputs(model, {"farm": 1.0})
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    other = ScalableLM.create(tmp_path / "plain", smollm2, settings())
    assert torch.equal(model.queries(TEXTS), other.queries(TEXTS))


def test_imported_and_merged_is_what_peft_gives(tmp_path, smollm2, farm, farm_task):
    folder, logits = farm
    model = ScalableLM.create(tmp_path / "store", smollm2, settings())
    model.import_adapter(folder, farm_task)
    model.merge("farm")
    try:
        found = outputs(smollm2, smollm2.model)
        # The change is rounded into the weights here, and how sums round depends on the processor.
        torch.testing.assert_close(found, logits, rtol=0, atol=5e-4)
        assert [a.text for a in model.ask([q for q, _ in ANIMALS], max_new_tokens=4)] == [
            a for _, a in ANIMALS
        ]
    finally:
        model.unmerge()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, smollm2):
    """A LLaMA of three small random layers, and its folder."""
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    torch.manual_seed(0)
    tokenizer = smollm2.renderer.tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_backbone(str(folder), settings().backbone), folder


def test_increments_of_other_ranks_and_layers_mix_in_one_batch_as_peft_gives_each_row(tmp_path, tiny):
    backbone, source = tiny
    model = ScalableLM.create(tmp_path / "store", backbone, settings(is_abstaining=False, top_k=1))
    variants = {
        "one": LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"]),
        "two": LoraConfig(r=9, lora_alpha=5, target_modules="all-linear", use_rslora=True),
        "three": LoraConfig(r=4, target_modules=r".*\.2\.mlp\.(up|down)_proj", alpha_pattern={"up_proj": 7}),
    }
    words = {"one": "red green blue", "two": "42 17 99", "three": "¿dónde está? ¡aquí!"}
    expected = {}
    for name, variant in variants.items():
        plain = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
        adapted = get_peft_model(plain, variant).eval()
        for parameter in (p for n, p in adapted.named_parameters() if "lora_" in n):
            torch.nn.init.normal_(parameter, std=0.2)
        adapted.save_pretrained(tmp_path / name)
        expected[name] = outputs(backbone, adapted, [words[name]])
        rows = [{"prompt": f"{words[name]} {i}", "completion": name} for i in range(6)]
        model.import_adapter(tmp_path / name, Task.from_rows(name, rows))
    assert [record.name for record in model.tasks] == list(words)
    batch = batch_of(backbone, list(words.values()))
    with torch.no_grad(), model._adapting(model.knowledge, batch, list(words.values())) as decided:
        logits = backbone.model(**backbone.inputs(batch)).logits
    assert decided[0].tasks[:, 0].tolist() == [0, 1, 2]
    for row, name in enumerate(words):
        torch.testing.assert_close(logits[row][batch.mask[row]], expected[name], rtol=0, atol=1e-5)


@pytest.fixture
def adapter(tmp_path, tiny):
    plain = LlamaForCausalLM.from_pretrained(tiny[1], dtype=torch.float32)
    get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_hostile_adapter_is_refused_and_the_store_stays_byte_identical(tmp_path, tiny, adapter, sums):
    model = ScalableLM.create(tmp_path / "store", tiny[0], settings())
    model.import_adapter(adapter, sums)
    answers, before = model.ask(TEXTS, max_new_tokens=3), digests(tmp_path / "store")
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    good, plain = weights.read_bytes(), json.loads(config.read_text())
    other = Task.from_rows("escape", [{"prompt": "a", "completion": "b"}])

    def spoil(name):
        tensors = load_file(weights)
        first = next(iter(tensors))
        tensors[first] = tensors[first] * torch.nan if name == "nan" else tensors[first][:1, :1].contiguous()
        save_file(tensors, weights)

    for damage in (
        lambda: weights.write_bytes(good[:100]),
        lambda: weights.write_bytes((2**40).to_bytes(8, "little") + good),
        lambda: spoil("nan"),
        lambda: spoil("shape"),
        lambda: config.write_text(json.dumps(plain | {"use_dora": True})),
        lambda: config.write_text(json.dumps(plain | {"r": 10**9})),
        lambda: config.write_text("{"),
        lambda: weights.unlink(),
    ):
        weights.write_bytes(good)
        config.write_text(json.dumps(plain))
        damage()
        with pytest.raises((StoreError, IncrementError)) as caught:
            model.import_adapter(adapter, other)
        assert "\n" not in str(caught.value)
        assert digests(tmp_path / "store") == before
    assert model.ask(TEXTS, max_new_tokens=3) == answers


def test_a_taken_name_and_labels_for_a_causal_backbone_are_refused(tmp_path, tiny, adapter, sums, moods):
    model = ScalableLM.create(tmp_path / "store", tiny[0], settings())
    model.import_adapter(adapter, sums)
    with pytest.raises(TaskError, match=r"task 'sums' is already learned"):
        model.import_adapter(adapter, sums)
    with pytest.raises(ConfigError, match=r"labels are those of an encoder's head, got 'bad', 'good'"):
        model.import_adapter(adapter, moods, labels=["bad", "good"])
    model.import_adapter(adapter, moods)
    assert model.restricted(["moods"], is_abstaining=False).ask("i loved it")[0].text in ("good", "bad")


def test_a_causal_adapter_that_saves_a_module_whole_is_refused(tmp_path, tiny, sums):
    plain = LlamaForCausalLM.from_pretrained(tiny[1], dtype=torch.float32)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    get_peft_model(plain, config).save_pretrained(tmp_path / "adapter")
    model = ScalableLM.create(tmp_path / "store", tiny[0], settings())
    with pytest.raises(IncrementError, match=r"saves the module of .*norm.* whole \(modules_to_save\)"):
        model.import_adapter(tmp_path / "adapter", sums)


def test_an_encoders_adapter_needs_a_head_that_fits(encoder, minilm, moods, tmp_path):
    encoder.export("moods", tmp_path / "out")
    model = ScalableLM.create(tmp_path / "store", minilm, encoder.config)
    notes, head = tmp_path / "out" / "slm.json", tmp_path / "out" / "head.safetensors"
    with pytest.raises(IncrementError, match=r"a head for the labels 'a', 'b', 'c' holds .*--labels"):
        model.import_adapter(tmp_path / "out", moods, labels=["a", "b", "c"])
    with pytest.raises(DataError, match=r"names 'yes', 'no', the examples have 'bad', 'good'"):
        model.import_adapter(tmp_path / "out", moods, labels=["yes", "no"])
    notes.unlink()
    with pytest.raises(IncrementError, match=r"a head for the labels \(none given\)"):
        model.import_adapter(tmp_path / "out", moods)
    spoilt = load_file(head)
    spoilt["bias"][0] = torch.inf
    save_file(spoilt, head)
    with pytest.raises(StoreError, match=r"holds NaN or infinity at 'bias'"):
        model.import_adapter(tmp_path / "out", moods, labels=["bad", "good"])
    save_file({name: tensor.to(torch.int32) for name, tensor in spoilt.items()}, head)
    with pytest.raises(IncrementError, match=r"values must be floats of 16 bits or more"):
        model.import_adapter(tmp_path / "out", moods, labels=["bad", "good"])
    save_file(spoilt | {"\x1b[2J\nFAKE LINE": spoilt["bias"].clone()}, head)
    with pytest.raises(IncrementError) as caught:
        model.import_adapter(tmp_path / "out", moods, labels=["\x1b[2J", "good"])
    assert str(caught.value).isprintable()
    head.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(StoreError, match=r"announces a header of"):
        model.import_adapter(tmp_path / "out", moods, labels=["bad", "good"])
    head.unlink()
    with pytest.raises(IncrementError, match=r"has no head.safetensors, without which an encoder cannot"):
        model.import_adapter(tmp_path / "out", moods)
    assert model.tasks == ()


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("", "each must be text that is not blank, without blanks around it, got ''"),
        (" bad", "each must be text that is not blank, without blanks around it, got ' bad'"),
        ("Good", "'Good' differs from 'good' only in case, blanks or Unicode form"),
        ("\ud800x", r"'\\ud800x' holds half a character \(U\+D800\): remove it"),
    ],
)
@pytest.mark.parametrize("is_noted", [True, False])
def test_labels_of_a_head_that_no_file_of_rows_can_give_are_refused(
    encoder, minilm, moods, tmp_path, label, said, is_noted
):
    encoder.export("moods", tmp_path / "out")
    head, file, labels = tmp_path / "out" / "head.safetensors", tmp_path / "out" / "slm.json", ["bad", "good"]
    save_file({name: torch.cat([part, part[:1]]) for name, part in load_file(head).items()}, head)
    notes = json.loads(file.read_text())
    notes["tasks"][0]["labels"] = [*labels, label]
    file.write_text(json.dumps(notes))
    model = ScalableLM.create(tmp_path / "store", minilm, encoder.config)
    with pytest.raises(DataError, match=rf"labels of the head of .*: {said}"):
        model.import_adapter(tmp_path / "out", moods, labels=[] if is_noted else [*labels, label])
    assert model.tasks == ()
    assert model.store.check() == []


def test_the_labels_of_an_encoders_head_may_stand_in_any_order(encoder, minilm, moods, tmp_path):
    encoder.export("moods", tmp_path / "out")
    head = tmp_path / "out" / "head.safetensors"
    save_file({name: tensor.flip(0) for name, tensor in load_file(head).items()}, head)
    model = ScalableLM.create(tmp_path / "store", minilm, encoder.config)
    model.import_adapter(tmp_path / "out", moods, labels=["good", "bad"])
    texts = [e.prompt for e in moods.examples]
    oracle = encoder.restricted(["moods"], is_abstaining=False).ask(texts)
    found = model.restricted(["moods"], is_abstaining=False).ask(texts)
    assert [a.text for a in found] == [a.text for a in oracle]


def test_an_adapter_of_a_transformers_classifier_gives_its_hidden_states_to_another_head(
    minilm, moods, tmp_path
):
    from transformers import AutoModelForSequenceClassification

    source = minilm.model.config._name_or_path
    plain = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2, dtype=torch.float32)
    adapted = get_peft_model(plain, LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS")).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    model = ScalableLM.create(tmp_path / "store", minilm, settings(has_background=False))
    with pytest.raises(
        IncrementError, match=r"has no head.safetensors, .*own 'bert.pooler', 'classifier' reads"
    ):
        model.import_adapter(tmp_path / "adapter", moods)
    head = {"weight": torch.randn(2, minilm.num_channels), "bias": torch.zeros(2)}
    save_file(head, tmp_path / "adapter" / "head.safetensors")
    report = model.import_adapter(tmp_path / "adapter", moods, labels=["bad", "good"])
    assert report.left_out == ("bert.pooler", "classifier")
    expected = outputs(minilm, adapted.base_model.model.bert)
    torch.testing.assert_close(bound_outputs(model, {"moods": 1.0}), expected, rtol=0, atol=1e-4)
