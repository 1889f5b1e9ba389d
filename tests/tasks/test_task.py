"""The constructor's messages, and the draws: stratified, deterministic, blind to order."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm.errors import ConfigError, DataError, TaskError
from slm.tasks import Example, Message, Task, TaskKind
from slm.tasks.sampling import fold


def make_task(num_good: int = 30, num_bad: int = 10) -> Task:
    examples = [Example(f"film {n} was fine", "good") for n in range(num_good)]
    examples += [Example(f"film {n} was dull", "bad") for n in range(num_bad)]
    return Task("films", TaskKind.CLASSIFICATION, tuple(examples), ("bad", "good"))


def count(examples, label: str) -> int:
    return sum(example.target == label for example in examples)


@pytest.mark.parametrize("name", ["", "Films", "-films", "a b", "a/b", "../a", "a" * 65, "é", "a\n"])
def test_a_name_that_is_not_allowed_is_refused_with_what_is_allowed(name):
    with pytest.raises(TaskError) as caught:
        Task(name, TaskKind.GENERATION, (Example("a", "b"),))
    assert str(caught.value) == (
        f"task name {name!r} is not allowed: use 1 to 64 of a-z, 0-9, dot, hyphen and underscore, "
        "the first one a letter or a digit"
    )


@pytest.mark.parametrize("name", ["a", "0", "bbc-topics", "agnews_v1.2", "a" * 64])
def test_a_plain_name_is_allowed(name):
    assert Task(name, TaskKind.GENERATION, (Example("a", "b"),)).name == name


@pytest.mark.parametrize(
    ("kind", "examples", "labels", "message"),
    [
        ("generation", [], (), 'task "t" has no examples, at least 1 is needed: add some'),
        (
            "generation",
            [Example("a", "b"), Example(" ", "b")],
            (),
            'task "t", example 2: the prompt is blank: fill it in or leave the example out',
        ),
        (
            "generation",
            [Example("a", None)],
            (),
            'task "t", example 1: the target is blank: fill it in or leave the example out',
        ),
        (
            "generation",
            [Example("a", 5)],
            (),
            'task "t", example 1: the target must be a text, got 5: write it as one',
        ),
        (
            "generation",
            [Example(["a"], "b")],
            (),
            "task \"t\", example 1: the prompt must be a text or a tuple of Message, got ['a']: mend it",
        ),
        (
            "generation",
            [Example("a", "half \ud83d")],
            (),
            'task "t", example 1: the target holds half a character (U+D83D): remove it',
        ),
        (
            "generation",
            [Example("a", "b")],
            ("b",),
            'task "t" is a generation, which has no labels: leave them out',
        ),
        (
            "classification",
            [Example("a", "c")],
            ("b", "d"),
            "task \"t\", example 1: target 'c' is none of the labels b, d: mend the target or add the label",
        ),
        (
            "classification",
            [Example("a", "b")],
            ("b",),
            'task "t": a classification needs at least 2 labels, got 1: add examples of another label '
            'or set kind to "generation"',
        ),
        (
            "classification",
            [Example("a", "b")],
            ("d", "b"),
            "task \"t\": labels must be sorted and unique, got ('d', 'b'): sort them",
        ),
    ],
)
def test_the_constructor_refuses_what_cannot_be_learned(kind, examples, labels, message):
    with pytest.raises(DataError) as caught:
        Task("t", TaskKind(kind), tuple(examples), labels)
    assert str(caught.value) == message


def test_a_test_example_is_checked_as_well():
    with pytest.raises(DataError, match="test example 1: the target is blank"):
        Task("t", TaskKind.GENERATION, (Example("a", "b"),), test=(Example("a"),))


def test_a_message_knows_only_three_roles_and_is_never_blank():
    with pytest.raises(DataError) as caught:
        Message("robot", "hello")
    assert str(caught.value) == "role must be system, user or assistant, got 'robot': use one of these"
    with pytest.raises(DataError) as caught:
        Message("user", " ")
    assert str(caught.value) == "content must be text that is not blank, got ' ': fill it in"


def test_a_conversation_reads_as_one_text():
    example = Example((Message("system", "Be brief."), Message("user", "Hi")), "Hello")
    assert example.prompt_text == "system: Be brief.\n\nuser: Hi"


def test_rows_in_memory_become_a_task():
    task = Task.from_rows("t", [{"text": "a", "label": True}, {"text": "b", "label": False}])
    assert task.kind is TaskKind.CLASSIFICATION
    assert task.labels == ("False", "True")
    assert task.examples == (Example("a", "True"), Example("b", "False"))


def test_a_bad_row_in_memory_is_named():
    with pytest.raises(DataError) as caught:
        Task.from_rows("t", [{"prompt": "a", "completion": "b"}, {"prompt": "", "completion": "b"}])
    assert str(caught.value) == (
        "row 2: \"prompt\" must be text that is not blank, got '': fill it in or delete the row"
    )


@pytest.mark.parametrize("row", [None, "text", ["text", "label"]])
def test_a_row_in_memory_that_is_no_dictionary_is_named(row):
    with pytest.raises(DataError, match=r"^row 2: expected a dictionary such as .*, got .*: mend it"):
        Task.from_rows("t", [{"text": "a", "label": "b"}, row])


def test_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError) as caught:
        Task.from_rows("t", [{"prompt": "a", "completion": "b"}], kind="regression")
    assert str(caught.value) == (
        'kind must be "classification" or "generation", got \'regression\': use one of these or leave it out'
    )


def test_a_sample_keeps_the_shares_of_the_labels_and_the_order():
    task = make_task(300, 100)
    sample = task.sample(40, seed=3)
    assert (count(sample.examples, "good"), count(sample.examples, "bad")) == (30, 10)
    assert sample.labels == task.labels
    assert list(sample.examples) == [example for example in task.examples if example in sample.examples]
    assert sample == task.sample(40, seed=3)
    assert sample != task.sample(40, seed=4)
    assert task.sample(1000) == task


def test_a_sample_per_label_has_as_many_of_each_and_contains_the_smaller_one():
    task = make_task(300, 100)
    few, more = task.sample_per_label(16, seed=3), task.sample_per_label(32, seed=3)
    assert (count(few.examples, "good"), count(few.examples, "bad")) == (16, 16)
    assert (few.labels, few.test) == (task.labels, task.test)
    assert set(few.examples) < set(more.examples) < set(task.examples)
    assert list(few.examples) == [example for example in task.examples if example in few.examples]
    assert few != task.sample_per_label(16, seed=4)
    backwards = dataclasses.replace(task, examples=task.examples[::-1]).sample_per_label(16, seed=3)
    assert set(backwards.examples) == set(few.examples)
    assert count(task.sample_per_label(200).examples, "bad") == 100
    train, validation = more.split(0.5)  # how 16 to learn from and 16 to validate on are had
    assert [count(part, y) for part in (train, validation) for y in ("good", "bad")] == [16] * 4


def test_a_sample_of_nothing_is_refused():
    for sample in (make_task().sample, make_task().sample_per_label):
        with pytest.raises(ConfigError, match="num_examples must be at least 1, got 0: raise it"):
            sample(0)
    free = Task.from_rows("free", [{"prompt": "p", "completion": "c"}])
    with pytest.raises(TaskError, match="task 'free' is a generation, which has no labels: use sample"):
        free.sample_per_label(1)


def test_a_split_is_disjoint_complete_and_stratified():
    task = make_task(300, 100)
    train, validation = task.split(0.1, seed=0)
    assert (count(validation, "good"), count(validation, "bad")) == (30, 10)
    assert sorted(map(repr, train + validation)) == sorted(map(repr, task.examples))
    assert not set(train) & set(validation)
    assert validation != task.split(0.1, seed=1)[1]


def test_a_split_keeps_equal_prompts_on_one_side():
    examples = [
        Example(f"{' ' * copy}Name film {n}", f"answer {copy}") for n in range(20) for copy in range(3)
    ]
    train, validation = Task("t", TaskKind.GENERATION, tuple(examples)).split(0.2, seed=0)
    assert len(validation) == 12
    assert not {fold(e.prompt_text) for e in train} & {fold(e.prompt_text) for e in validation}


def test_a_split_of_fewer_than_ten_examples_sets_none_aside():
    assert make_task(6, 3).split(0.5) == (make_task(6, 3).examples, ())
    assert len(make_task(6, 4).split(0.5)[1]) == 5


def test_a_split_never_takes_the_last_prompt_of_a_label():
    train, validation = make_task(20, 1).split(0.9)
    assert count(train, "bad") == 1
    assert len(validation) == 19


@pytest.mark.parametrize("seed", range(8))
def test_a_split_never_takes_the_only_prompt_of_a_label_that_shares_it(seed):
    examples = [Example(f"film {n}", "a") for n in range(10)]
    examples += [Example(f"film {n}", "b") for n in (0, 1)]
    train, validation = Task("t", TaskKind.CLASSIFICATION, tuple(examples), ("a", "b")).split(0.8, seed)
    assert count(train, "b") >= 1
    assert len({e.prompt for e in validation}) >= 7


def test_a_split_stays_below_its_largest_size():
    assert len(make_task(300, 100).split(0.5, max_rows=20)[1]) == 20
    assert make_task().split(0.5, max_rows=0)[1] == ()


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ConfigError) as caught:
        make_task().split(share)
    assert str(caught.value) == f"validation_share must be in 0 ≤ share < 1, got {share}: lower it"


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(24)), st.integers(0, 3), st.sampled_from([0.1, 0.3, 0.5]))
def test_a_split_does_not_depend_on_the_order_of_the_examples(order, seed, share):
    task = make_task(16, 8)
    shuffled = dataclasses.replace(task, examples=tuple(task.examples[row] for row in order))
    validation = task.split(share, seed)[1]
    assert len(validation) == round(24 * share)
    assert set(shuffled.split(share, seed)[1]) == set(validation)


def test_the_digest_follows_the_content_and_not_the_name():
    task = make_task()
    assert len(task.digest()) == 64
    assert dataclasses.replace(task, name="other").digest() == task.digest()
    changes = [
        dataclasses.replace(task, examples=task.examples[1:]),
        dataclasses.replace(task, test=task.examples[:1]),
        dataclasses.replace(task, labels=("bad", "fair", "good")),
        Task("films", TaskKind.GENERATION, task.examples),
    ]
    assert len({task.digest(), *(change.digest() for change in changes)}) == 5


def test_a_conversation_and_its_plain_text_have_different_digests():
    talk = Example((Message("user", "Hi"),), "Hello")
    plain = Example("user: Hi", "Hello")
    digests = {Task("t", TaskKind.GENERATION, (example,)).digest() for example in (talk, plain)}
    assert len(digests) == 2


def test_a_kind_may_be_given_by_name():
    examples = (Example("a", "x"), Example("b", "y"))
    assert Task("t", "classification", examples, ("x", "y")).kind is TaskKind.CLASSIFICATION
    with pytest.raises(ConfigError, match='kind must be "classification" or "generation"'):
        Task("t", "regression", examples)
