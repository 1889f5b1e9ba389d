"""Every method, by its name: it learns two tasks and answers every row of both."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

from slm.bench.baselines import NAMES, rival
from slm.errors import ConfigError, LearningError
from slm.tasks import Stream
from tests.bench.baselines.conftest import SETTINGS, colours, sizes, texts_of


def taught(name, setup, family, tasks=None, **learning):
    method = rival(name)(setup(family, SETTINGS.get(name), **learning))
    stream = Stream(tasks or (colours(), sizes()))
    if method.is_joint:
        method.learn_all(stream)
    else:
        for task in stream:
            method.learn(task)
    return method, stream


def ask(method, stream):
    rows = stream.mixed_test(7)
    questions = [example.prompt for _, example in rows]
    return rows, method.ask(questions, [name for name, _ in rows] if method.needs_task_id else None)


@pytest.mark.parametrize("name", NAMES)
def test_an_encoder_learns_two_tasks_and_answers_every_row(name, setup):
    method, stream = taught(name, setup, "BERT")
    rows, answers = ask(method, stream)
    assert len(answers) == len(rows) == 14
    known = {None, *stream["colours"].labels, *stream["sizes"].labels}
    assert {answer.text for answer in answers} <= known
    if name == "frozen":
        assert {answer.text for answer in answers} == {None}
        assert method.size_bytes == 0
    else:
        assert any(answer.text is not None for answer in answers)
        assert method.size_bytes > 0
    if method.needs_task_id:
        for (task, _), answer in zip(rows, answers, strict=True):
            assert name == "slm-cosine-voting" or answer.text in stream[task].labels
    routed = method.nearest([example.prompt for _, example in rows])
    is_router = name in ("mean-key", "slm-cosine", "slm", "slm-never-abstaining")
    assert (routed is not None) == is_router
    assert not is_router or set(routed) <= set(stream.names)
    assert all(layer.binding is None for layer in method.setup.backbone.reparameterizer.layers.values())


@pytest.mark.parametrize("name", NAMES)
def test_no_answer_depends_on_what_a_task_is_called(name, setup):
    """A name that reached an input would be a task-ID."""
    method, stream = taught(name, setup, "BERT")
    rows, answers = ask(method, stream)
    called = {"colours": "quartz", "sizes": "zebra"}
    other, _ = taught(
        name, setup, "BERT", tuple(dataclasses.replace(task, name=called[task.name]) for task in stream)
    )
    owners = [called[task] for task, _ in rows] if method.needs_task_id else None
    renamed = other.ask([example.prompt for _, example in rows], owners)
    assert [(a.text, a.confidence) for a in answers] == [(a.text, a.confidence) for a in renamed]


ALIKE = ("replay-1", "replay-10", "mean-key", "slm-cosine", "slm-never-abstaining", "joint", "joint-wide")
"""Methods of which another one writes in the very same way."""
WRITERS = [(name, "LLaMA") for name in NAMES if name not in ALIKE]
WRITERS += [(name, "T5") for name in ("sequential", "l2p", "progressive-prompts", "slm-cosine-voting")]


@pytest.mark.parametrize(("name", "family"), WRITERS)
def test_a_backbone_that_writes_learns_two_tasks_and_answers_every_row(name, family, setup):
    method, stream = taught(name, setup, family)
    rows, answers = ask(method, stream)
    assert len(answers) == len(rows)
    assert all(isinstance(answer.text, str) for answer in answers)
    if name in ("oracle", "progressive-prompts"):  # told the task, they choose among its labels
        assert all(a.text in stream[task].labels for (task, _), a in zip(rows, answers, strict=True))


def test_a_method_that_learns_gets_its_task_right(setup):
    for name, learning in (
        ("sequential", {}),
        ("sequential-lora", {"learning_rate": 5e-3}),
        ("l2p", {}),
        ("progressive-prompts", {}),
    ):
        settings = {"learning_rate": 5e-3} if name == "sequential" else None
        method = rival(name)(setup("BERT", settings, num_epochs=12, patience=12, **learning))
        method.learn(colours(60))
        questions = texts_of(colours(60))
        answers = method.ask(questions, ["colours"] * len(questions) if method.needs_task_id else None)
        right = [a.text == e.target for a, e in zip(answers, colours(60).test, strict=True)]
        assert sum(right) >= 0.9 * len(right), name


def test_the_frozen_backbone_never_changes_and_says_what_it_said_before(setup):
    method = rival("frozen")(setup("LLaMA"))
    before = method.ask(texts_of(colours()))
    weights = {name: value.clone() for name, value in method.setup.backbone.model.state_dict().items()}
    for name in ("sequential", "sequential-lora", "l2p", "progressive-prompts", "o-lora"):
        rival(name)(setup("LLaMA")).learn(colours())
    method.learn(colours())
    assert method.ask(texts_of(colours())) == before
    for name, value in method.setup.backbone.model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_the_frozen_backbone_is_asked_a_question_once(setup, monkeypatch):
    method = rival("frozen")(setup("LLaMA"))
    questions, further = texts_of(colours()), texts_of(sizes())
    expected = method.ask([*questions, *further])
    asked: list[str] = []
    ask = method.ask
    monkeypatch.setattr(method, "ask", lambda some: asked.extend(some) or ask(some))
    method.ask_again(questions)
    again = [method.ask_again([*questions, *further]) for _ in range(2)]
    assert asked == [*questions, *further]
    assert [[answer.text for answer in answers] for answers in again] == 2 * [[a.text for a in expected]]


def test_sequential_lora_learns_its_first_task_as_slm_learns_it(setup):
    shared = rival("sequential-lora")(setup("BERT", num_epochs=2))
    shared.learn(colours(40))
    alone = rival("slm")(setup("BERT", num_epochs=2))
    alone.learn(colours(40))
    record = alone.model.store.task("colours")
    kept = alone.model.store.increment(record, 0).pairs
    (own,) = (increment.in_float16() for increment in shared.knowledge.increments())
    assert kept.keys() == own.pairs.keys()
    for name, pair in own.pairs.items():
        assert torch.equal(pair.A, kept[name].A)
        assert torch.equal(pair.B, kept[name].B)
    assert torch.equal(shared.knowledge.head_tensors()["weight"], alone.model.store.head(record)["weight"])


@pytest.mark.parametrize("name", ["sequential", "sequential-lora", "l2p", "progressive-prompts"])
def test_a_diverged_training_is_refused_with_its_learning_rate(name, setup):
    settings = {"learning_rate": 1.0 if name != "sequential" else 0.9}
    method = rival(name)(setup("BERT", settings, max_grad_norm=1e6, num_epochs=1))
    for parameter in _parameters(method):
        parameter.data.fill_(torch.inf)
    if name == "progressive-prompts":
        method.setup.backbone.model.get_input_embeddings().weight.data, kept = (
            torch.full_like(method.setup.backbone.model.get_input_embeddings().weight, torch.inf),
            method.setup.backbone.model.get_input_embeddings().weight.data,
        )
    try:
        with pytest.raises(LearningError, match="learning_rate"):
            method.learn(colours())
    finally:
        if name == "progressive-prompts":
            method.setup.backbone.model.get_input_embeddings().weight.data = kept


def _parameters(method):
    for holder in ("whole", "knowledge", "pool"):
        if hasattr(method, holder):
            return list(getattr(method, holder).parameters())
    return []


def test_joint_training_of_all_tasks_has_the_summed_rank_and_one_scale(setup):
    wide, _ = taught("joint-wide", setup, "BERT")
    one, _ = taught("joint", setup, "BERT")
    assert (wide.knowledge.bindings[0].rank, one.knowledge.bindings[0].rank) == (4, 2)
    assert wide.knowledge.bindings[0].scale == one.knowledge.bindings[0].scale
    assert one.knowledge.labels == ["big", "blue", "red", "small"]


def test_a_label_limit_keeps_earlier_labels_from_being_pushed_down(setup):
    methods = {}
    for masks in (0.0, 1.0):
        methods[masks] = rival("sequential-lora")(setup("BERT", {"masks_labels": masks}))
        for task in (colours(), sizes()):
            methods[masks].learn(task)
    heads = {masks: method.knowledge.head.weight for masks, method in methods.items()}
    first = rival("sequential-lora")(setup("BERT", {"masks_labels": 1.0}))
    first.learn(colours())
    decayed = heads[1.0][:2] / first.knowledge.head.weight
    assert torch.allclose(decayed, decayed[0, 0].expand_as(decayed), atol=1e-4)  # weight decay alone
    assert not torch.allclose(heads[0.0][:2], heads[1.0][:2], atol=1e-3)


def test_an_unknown_method_and_an_unknown_setting_are_refused_with_the_nearest(setup):
    with pytest.raises(ConfigError, match=r"method 'replay' is unknown.*did you mean 'replay-1'"):
        rival("replay")
    with pytest.raises(ConfigError, match=r"no setting 'strenght', known are .*did you mean 'strength'"):
        rival("ewc")(setup("BERT", {"strenght": 1.0}))


def test_the_names_load_no_torch():
    code = "import sys, slm.bench.baselines as b; assert 'slm' in b.NAMES; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
