"""Scorers against slow references, and which task gets which."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm.errors import ConfigError, DataError
from slm.evaluation.scorers import SCORERS, accuracy, exact_match, rouge_l, rouge_l_unicode, scorer_for
from slm.tasks import Example, Task, TaskKind

WORDS = st.lists(st.sampled_from(["red", "blue", "sky", "dog", "sun"]), min_size=1, max_size=7)


def generation(*targets: str) -> Task:
    return Task(
        "t", TaskKind.GENERATION, (Example("q", "a"),), test=tuple(Example("q", target) for target in targets)
    )


def reference_rouge_l(answer: list[str], target: list[str]) -> float:
    """F1 of the longest common subsequence, by trying all of the target's."""

    def is_inside(part, words) -> bool:
        left = iter(words)
        return all(word in left for word in part)

    longest = 0
    for chosen in range(2 ** len(target)):
        part = [word for i, word in enumerate(target) if chosen >> i & 1]
        if is_inside(part, answer):
            longest = max(longest, len(part))
    return 2 * longest / (len(answer) + len(target))


def test_accuracy_counts_equal_texts_up_to_white_space_around_them():
    assert accuracy(["yes", " no\n", "No", None], ["yes", "no", "no", "no"]) == 0.5


def test_exact_match_ignores_case_white_space_and_periods_at_the_end():
    answers = ["Paris.", " new   york ", "42", "4 2", "U.S."]
    assert exact_match(answers, ["paris", "New York", "42.", "42", "u.s"]) == 0.8


def test_exact_match_does_not_take_periods_alone_for_nothing():
    assert exact_match(["", "."], [".", "."]) == 0.5


@pytest.mark.parametrize("name", SCORERS)
def test_an_answer_of_none_is_wrong_and_the_same_text_is_right(name):
    scorer = SCORERS[name]
    assert scorer([None, None], ["a", "None"]) == 0.0
    assert scorer([None, "a red dog"], ["a", "a red dog"]) == 0.5
    assert scorer.name == name


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
def test_rouge_l_is_the_mean_f1_of_the_longest_common_subsequence(pairs):
    answers, targets = ([" ".join(words) for words in side] for side in zip(*pairs, strict=True))
    expected = sum(reference_rouge_l(answer, target) for answer, target in pairs) / len(pairs)
    assert rouge_l(answers, targets) == pytest.approx(expected)


def test_rouge_l_compares_stems():
    assert rouge_l(["jumping dogs"], ["jumped dog"]) == 1.0


def test_rouge_l_sees_no_words_outside_a_to_z_and_0_to_9():
    assert rouge_l(["東京"], ["東京"]) == 0.0


@pytest.mark.parametrize(
    ("answer", "target", "score"),
    [
        ("東京に行く", "東京に行った", 2 * 4 / (5 + 6)),
        ("мы едем в москву", "Мы едем в Киев", 3 / 4),
        ("l'été est fini", "L'ÉTÉ est fini", 1.0),
        ("l’e\u0301te\u0301 est fini", "l'été est fini", 1.0),  # another apostrophe, and é as two characters
        ("हिन्दी भाषा", "हिन्दी लिपि", 1 / 2),
        ("ฉันรัก", "ฉันไป", 2 * 2 / (4 + 4)),  # ฉั น รั ก, ฉั น ไ ป
        ("ﾄｳｷｮｳ", "トウキョウ", 1.0),  # half and full width
        ("—", "...", 0.0),
    ],
)
def test_rouge_l_unicode_reads_other_scripts(answer, target, score):
    assert rouge_l_unicode([answer], [target]) == pytest.approx(score)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(max_codepoint=127)), st.text(st.characters(max_codepoint=127)))
def test_rouge_l_unicode_of_ascii_is_rouge_l(answer, target):
    assert rouge_l_unicode([answer], [target]) == rouge_l([answer], [target])


def test_words_are_stemmed_in_any_company():
    assert rouge_l_unicode(["jumping über dogs"], ["jumped über dog"]) == 1.0


@pytest.mark.parametrize("name", SCORERS)
def test_scorers_need_an_answer_for_each_target_and_at_least_one(name):
    with pytest.raises(DataError) as caught:
        SCORERS[name](["a"], ["a", "b"])
    assert str(caught.value) == "there are 1 answers but 2 targets: give one for each"
    with pytest.raises(DataError) as caught:
        SCORERS[name]([], [])
    assert str(caught.value) == "a score needs at least 1 row, got 0: give some"


def test_a_classification_is_scored_by_accuracy():
    task = Task("t", TaskKind.CLASSIFICATION, (Example("q", "a"),), ("a", "b long label of words"))
    assert scorer_for(task).name == "accuracy"


def test_a_generation_is_scored_by_exact_match_when_every_test_target_is_short():
    assert scorer_for(generation("one two three", "four")).name == "exact_match"
    assert scorer_for(generation("one two three four", "four")).name == "rouge_l"


@pytest.mark.parametrize(
    ("targets", "name"),
    [
        (["東京都", "大阪"], "exact_match"),
        (["東京に行く"], "rouge_l_unicode"),
        (["мы едем в москву"], "rouge_l_unicode"),
        (["привет"], "exact_match"),
        (["it costs 5 € — “cheap”, he said"], "rouge_l"),  # signs are no letters
        (["we met at the café"], "rouge_l_unicode"),
    ],
)
def test_targets_of_another_script_are_counted_and_scored_in_it(targets, name):
    assert scorer_for(generation(*targets)).name == name


def test_a_metric_can_be_chosen_by_name_and_an_unknown_one_is_answered_with_the_nearest():
    assert scorer_for(generation("short"), "rouge_l").name == "rouge_l"
    with pytest.raises(ConfigError) as caught:
        scorer_for(generation("short"), "rouge")
    assert str(caught.value) == (
        "metric 'rouge' is unknown, known are accuracy, exact_match, rouge_l, rouge_l_unicode: "
        'did you mean "rouge_l"?'
    )
    with pytest.raises(ConfigError, match="rouge_l_unicode: use one of these"):
        scorer_for(generation("short"), "xyz")
