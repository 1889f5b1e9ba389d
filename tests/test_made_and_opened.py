"""What a store says of its settings is what it was made with, and what it cannot keep is refused at once."""

from __future__ import annotations

import builtins
import dataclasses
import shutil

import pytest
import torch

from slm.backbone.load import load_backbone, locate
from slm.config import BackboneConfig, Config, CosineConfig, LearningConfig, RetrievalConfig
from slm.errors import BackboneError, ConfigError, StoreError
from slm.model import ScalableLM
from tests.backbone.families import load, save

QUICK = RetrievalConfig(has_background=False)
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}<s>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny causal model with a chat template."""
    path = save("LLaMA", tmp_path_factory.mktemp("models") / "chatty")
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def loaded(folder, **settings):
    return load_backbone(str(folder), BackboneConfig(**{"dtype": "float32", "device": "cpu", **settings}))


@pytest.fixture(scope="module")
def plain(folder):
    """Loaded otherwise than by default."""
    return loaded(folder, max_tokens=96, prompt_format="plain")


@pytest.mark.parametrize("given", [BackboneConfig(), BackboneConfig(max_tokens=96, prompt_format="plain")])
def test_a_store_keeps_how_its_backbone_was_loaded_and_is_opened_so(tmp_path, folder, plain, given):
    made = ScalableLM.create(tmp_path / "store", plain, Config(backbone=given, retrieval=QUICK))
    assert made.config.backbone == plain.config
    again = ScalableLM.open(tmp_path / "store")
    assert again.config == made.config
    assert (again.backbone.renderer.prompt_format, again.backbone.renderer.max_tokens) == ("plain", 96)
    assert torch.equal(again.queries("hello there"), made.queries("hello there"))


def test_the_same_settings_in_other_words_are_no_others(tmp_path, folder):
    usual = load_backbone(str(folder), BackboneConfig(device="cpu"))
    dtype = str(usual.dtype).removeprefix("torch.")
    given = BackboneConfig(dtype=dtype, device="cpu", max_tokens=128, prompt_format="chat")
    made = ScalableLM.create(tmp_path / "store", usual, Config(backbone=given, retrieval=QUICK))
    assert made.config.backbone == given
    assert ScalableLM.open(tmp_path / "store", usual).config == made.config


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_tokens": 64}, r"^backbone.max_tokens is 64, '.*chatty' was loaded with 96: leave the setting"),
        ({"prompt_format": "chat"}, r"^backbone.prompt_format is 'chat', '.*' was loaded with 'plain': "),
        ({"quantization": "int8"}, r"^backbone.quantization is 'int8', '.*' was loaded with 'none': leave"),
        ({"dtype": "bfloat16"}, r"^backbone.dtype is 'bfloat16', '.*' was loaded with 'float32': leave"),
    ],
)
def test_settings_that_a_loaded_backbone_does_not_have_are_refused(tmp_path, plain, given, message):
    with pytest.raises(ConfigError, match=message):
        ScalableLM.create(tmp_path / "store", plain, Config(backbone=BackboneConfig(**given)))
    assert not (tmp_path / "store").exists()


def test_a_store_is_opened_with_no_backbone_that_makes_other_rows_of_prompts(tmp_path, folder, plain):
    ScalableLM.create(tmp_path / "store", plain, Config(retrieval=QUICK))
    for settings, told in (
        ({"max_tokens": 96}, r"prompt_format 'plain', not 'chat', as '.*chatty' was loaded: load it with"),
        ({"prompt_format": "plain"}, r"max_tokens 96, not 128, as '.*chatty' was loaded: load it with"),
    ):
        with pytest.raises(StoreError, match=told):
            ScalableLM.open(tmp_path / "store", loaded(folder, **settings))
    other_machine = loaded(folder, max_tokens=96, prompt_format="plain", dtype="bfloat16")
    assert ScalableLM.open(tmp_path / "store", other_machine).tasks == ()


def test_a_sentence_encoder_is_found_from_any_folder(tmp_path, minilm, monkeypatch):
    pytest.importorskip("sentence_transformers")
    shutil.copytree(locate("minilm"), tmp_path / "enc")
    monkeypatch.chdir(tmp_path)
    retrieval = RetrievalConfig(extractor="sentence", sentence_model="enc", has_background=False)
    made = ScalableLM.create("store", minilm, Config(retrieval=retrieval))
    assert made.config.retrieval.sentence_model == str(tmp_path / "enc")
    monkeypatch.chdir("/")
    again = ScalableLM.open(tmp_path / "store", minilm)
    assert torch.equal(again.queries("hello there"), made.queries("hello there"))


def test_groups_that_do_not_divide_a_sentence_encoders_channels_make_no_store(tmp_path, minilm):
    pytest.importorskip("sentence_transformers")
    retrieval = RetrievalConfig(form="cosine", extractor="sentence", cosine=CosineConfig(num_groups=5))
    with pytest.raises(ConfigError, match=r"^num_groups must divide the 384 channels of a query, got 5"):
        ScalableLM.create(tmp_path / "store", minilm, Config(retrieval=retrieval))
    assert not (tmp_path / "store").exists()


def test_the_vector_index_without_faiss_makes_no_store(tmp_path, plain, monkeypatch):
    genuine = builtins.__import__

    def without_faiss(name, *args, **options):
        if name == "faiss":
            raise ImportError("No module named 'faiss'")
        return genuine(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without_faiss)
    config = Config(retrieval=dataclasses.replace(QUICK, index="vector"))
    with pytest.raises(ConfigError, match="index 'vector' needs FAISS"):
        ScalableLM.create(tmp_path / "store", plain, config)
    assert not (tmp_path / "store").exists()


def test_the_vector_index_with_faiss_makes_one(tmp_path, plain):
    pytest.importorskip("faiss")
    config = Config(retrieval=dataclasses.replace(QUICK, index="vector"))
    assert ScalableLM.create(tmp_path / "store", plain, config).tasks == ()


def test_starts_that_no_task_of_a_causal_backbone_could_take_make_no_store(tmp_path, plain):
    config = Config(retrieval=QUICK, learning=LearningConfig(start="retrieved"))
    with pytest.raises(ConfigError, match=r"start is 'retrieved'.*causal backbone: set start to 'none'"):
        ScalableLM.create(tmp_path / "store", plain, config)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps"])
def test_a_device_that_this_machine_does_not_have_is_named(folder, device):
    if torch.cuda.device_count() > 7 or torch.backends.mps.is_available():
        pytest.skip("this machine has it")
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has it")
    with pytest.raises(
        BackboneError, match=rf"^device '{device}' cannot be used on this machine \(.+\): use 'auto' or"
    ):
        loaded(folder, device=device)


def test_an_encoders_prompt_format_means_nothing(tmp_path):
    backbone = load(save("BERT", tmp_path / "bert"))
    config = Config(backbone=BackboneConfig(prompt_format="plain"), retrieval=QUICK)
    made = ScalableLM.create(tmp_path / "store", backbone, config)
    assert made.config.backbone.prompt_format == "plain"
    assert ScalableLM.open(tmp_path / "store", backbone).tasks == ()
