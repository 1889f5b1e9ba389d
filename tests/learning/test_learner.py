"""Learning: what it reports, what it refuses, what it does not look at."""

from __future__ import annotations

import dataclasses
import errno
from types import SimpleNamespace

import pytest
import torch

from slm.errors import ConfigError, DataError, StoreError
from slm.learning import learn_task, learner, show_examples
from slm.learning.learnable import Learnable
from slm.model import ScalableLM
from slm.tasks import Task
from tests.conftest import config


def test_the_report_says_what_was_taught_and_what_it_takes(tmp_path, minilm, languages):
    model = ScalableLM.create(tmp_path / "store", minilm, config(2))
    report = model.learn(languages)
    assert (report.task, report.kind, report.num_examples) == ("languages", "classification", 30)
    assert report.num_validation == 3
    assert report.validation_metric == "accuracy"
    assert 0.0 <= report.validation_score <= 1.0
    assert report.size_bytes == sum(f.size_bytes for f in model.tasks[0].files)
    assert report.time_s > 0


def test_the_backbone_is_the_same_to_the_bit_after_learning(tmp_path, minilm, languages):
    before = {name: tensor.clone() for name, tensor in minilm.model.state_dict().items()}
    model = ScalableLM.create(tmp_path / "store", minilm, config(1))
    model.learn(languages)
    after = minilm.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(layer.binding is None for layer in minilm.reparameterizer.layers.values())
    assert not any(p.requires_grad for p in minilm.model.parameters())


def test_increments_are_stored_as_they_were_trained_rounded_once_to_float16(
    tmp_path, minilm, languages, monkeypatch
):
    trained, plain = [], Learnable.increments
    monkeypatch.setattr(Learnable, "increments", lambda self: trained.append(plain(self)) or trained[-1])
    model = ScalableLM.create(tmp_path / "store", minilm, config(1))
    model.learn(languages)
    stored = model.store.increment(model.tasks[0], 0)
    assert any(bool(pair.B.any()) for pair in trained[-1][0].pairs.values())
    for name, pair in trained[-1][0].pairs.items():
        assert pair.A.dtype == torch.float32
        assert torch.equal(stored.pairs[name].A, pair.A.half())
        assert torch.equal(stored.pairs[name].B, pair.B.half())


@pytest.fixture
def idle(tmp_path, minilm, monkeypatch):
    """A model that may not compute."""

    def compute(*_, **__):
        raise AssertionError("it computed")

    monkeypatch.setattr("slm.learning.learner.training_rows", compute)
    return ScalableLM.create(tmp_path / "store", minilm, config(1))


def test_checkpoints_that_cannot_be_kept_are_refused_before_anything_is_computed(tmp_path, idle, languages):
    (tmp_path / "file").write_text("")
    for folder, why in ((tmp_path / "file", "File exists"), ("/proc/nope", "No such file or directory")):
        with pytest.raises(ConfigError) as caught:
            idle.learn(languages, checkpoint_folder=str(folder))
        assert str(caught.value) == (
            f"checkpoints cannot be kept at {folder} ({why}): name a folder you may write to"
        )


def test_a_store_that_cannot_be_written_is_refused_before_anything_is_computed(idle, languages, monkeypatch):
    def refuse(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr("slm.store.catalogue.TemporaryFile", refuse)
        with pytest.raises(StoreError, match=r"store cannot be written \(Read-only file system\)"):
            idle.learn(languages)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(StoreError, match=r"store has 0\.0 MB of disk left, at least \d+\.\d MB are needed"):
        idle.learn(languages)


def test_the_room_that_is_asked_for_is_what_the_increments_take(tmp_path, minilm, languages):
    model = ScalableLM.create(tmp_path / "store", minilm, config(1))
    asked = learner._smallest_size(model)
    assert asked <= model.learn(languages).size_bytes
    increment = model.store.increment(model.tasks[0], 0)
    assert asked == sum(2 * (pair.A.numel() + pair.B.numel()) for pair in increment.pairs.values())


def test_few_examples_are_learned_without_a_validation_split(tmp_path, minilm):
    rows = [{"text": t, "label": y} for t, y in (("oui", "fr"), ("non", "fr"), ("ja", "de"), ("nein", "de"))]
    report = ScalableLM.create(tmp_path / "store", minilm, config(1)).learn(Task.from_rows("few", rows))
    assert (report.num_validation, report.validation_score) == (0, None)


def test_examples_are_shown_as_the_model_sees_them(causal, encoder, sums, moods):
    text = show_examples(causal, sums, 1)[0]
    assert text.startswith("<|im_start|>system")
    assert "what is 2 plus 3?<|im_end|>" in text
    assert text.endswith("<|im_start|>assistant\n ⟶ 5<|im_end|>")
    assert show_examples(encoder, moods, 1) == ["[CLS] what a lovely film [SEP] ⟶ good"]


def test_a_row_that_is_too_long_is_refused_with_its_number_and_nothing_is_stored(tmp_path, minilm):
    rows = [{"text": t, "label": y} for t, y in (("short", "a"), ("long " * 300, "b"))]
    model = ScalableLM.create(tmp_path / "store", minilm, config(1))
    with pytest.raises(DataError, match=r"^example 2 of task 'lengths' has \d+ tokens, the window holds 128"):
        model.learn(Task.from_rows("lengths", rows))
    assert model.tasks == ()


def test_several_processes_need_a_folder_they_share(tmp_path, minilm, languages, monkeypatch):
    model = ScalableLM.create(tmp_path / "store", minilm, config(1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ConfigError, match=r"^several processes learn together only with checkpoint_folder set"
    ):
        learn_task(model, languages)


def test_a_prompt_that_stands_many_times_is_known_from_one_text(tmp_path, minilm, languages):
    model = ScalableLM.create(tmp_path / "store", minilm, config(1))
    often = dataclasses.replace(languages, examples=languages.examples * 5)
    once, repeated = (learner.prepare(model, task, model.config.learning).keys for task in (languages, often))
    assert repeated.counts.tolist() == once.counts.tolist()
    torch.testing.assert_close(repeated.means, once.means, atol=1e-5, rtol=1e-5)
    assert repeated.radius == pytest.approx(once.radius, rel=1e-2)
