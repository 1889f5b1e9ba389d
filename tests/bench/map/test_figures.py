"""The figures of a map, read as plotly reads them."""

from __future__ import annotations

import dataclasses
import math

import plotly.graph_objects as go
import pytest

from slm.bench.map.confusion_figure import NUM_TICKS, draw_confusion
from slm.bench.map.plane_figure import COLOURS, choose_looks, draw_plane, tell_question
from slm.bench.map.store_map import Confusion, MappedKey, MappedQuestion, StoreMap

QUESTION = MappedQuestion("why?", "t0", True, "t0", (("t0", 1.0),), 1.5, 9.0, False, (0.0, 0.0), "t0")


def map_of(num_tasks: int, questions: tuple[MappedQuestion, ...] = (), **changes: object) -> StoreMap:
    """A map with keys on a grid."""
    names = tuple(f"t{i}" for i in range(num_tasks))
    places = [(float(10 * (i % 8)), float(10 * (i // 8))) for i in range(num_tasks)]
    square = ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0))
    drawn = StoreMap(
        form="gaussian",
        tasks=names,
        keys=tuple(MappedKey(name, place, 9.0) for name, place in zip(names, places, strict=True)),
        questions=questions,
        num_axes=2,
        num_directions=num_tasks - 1,
        drawn_share=0.5,
        regions={name: [square] for name in names},
        borders=[],
        reaches=[(name, square) for name in names],
        is_exact=False,
        is_reach_exact=False,
        is_abstaining=True,
    )
    return dataclasses.replace(drawn, **changes)


def confusion_of(num_tasks: int) -> Confusion:
    """All right but one question of each task, which the next one gets."""
    names = tuple(f"t{i}" for i in range(num_tasks))
    counts = tuple(
        tuple(9 if j == i else int(j == (i + 1) % num_tasks) for j in range(num_tasks + 1))
        for i in range(num_tasks)
    )
    return Confusion(names, num_tasks, (*names, "abstained"), counts)


def named(figure, name: str):
    """The traces whose name begins so."""
    return [trace for trace in figure["data"] if str(trace.get("name", "")).startswith(name)]


@pytest.mark.parametrize("num_tasks", [1, 2, 7, 60])
def test_plotly_takes_every_figure(num_tasks):
    odd = [dataclasses.replace(QUESTION, is_abstained=True), dataclasses.replace(QUESTION, task=None)]
    drawings = (
        draw_plane(map_of(num_tasks, (QUESTION, *odd))),
        draw_plane(map_of(num_tasks, num_axes=0, reaches=())),
        draw_confusion(confusion_of(num_tasks)),
    )
    for drawing in drawings:  # plotly refuses what it does not know
        assert len(go.Figure(drawing).data) == len(drawing["data"]) > 0


def test_a_question_looks_like_its_nearest_task_and_abstained_and_misrouted_ones_are_marked():
    wrong = dataclasses.replace(QUESTION, task="t1", place=(3.0, 4.0))
    refused = dataclasses.replace(QUESTION, is_abstained=True, weights=(), place=(5.0, 6.0))
    figure = draw_plane(map_of(3, (QUESTION, wrong, refused)))
    looks = choose_looks(map_of(3))
    marks, entry = named(figure, "question")
    assert list(zip(marks["marker"]["color"], marks["marker"]["symbol"], strict=True)) == [looks["t0"]] * 2
    assert entry["name"] == "question (2)"
    ring, _ = named(figure, "misrouted")
    assert (ring["x"], ring["y"], ring["marker"]["symbol"]) == ([3.0], [4.0], "circle-open")
    cross, _ = named(figure, "abstained")
    assert (cross["x"], cross["marker"]["symbol"]) == ([5.0], "x-thin")
    shown = [trace["name"] for trace in figure["data"] if trace.get("showlegend", True)]
    assert shown == ["reach of a key", "question (2)", "abstained (1)", "misrouted (1)", "key (3)"]


def test_fifty_tasks_all_look_different_and_equal_colours_lie_far_apart():
    looks = choose_looks(map_of(50))
    assert len(set(looks.values())) == 50
    places = {key.task: key.place for key in map_of(50).keys}
    alike = [
        math.dist(places[a], places[b]) for a in looks for b in looks if a < b and looks[a][0] == looks[b][0]
    ]
    assert min(alike) > 10  # never neighbours
    assert {colour for colour, _ in looks.values()} == set(COLOURS)


def test_reaches_are_hidden_where_they_are_only_shadows():
    assert {t["visible"] for t in named(draw_plane(map_of(4)), "reach")} == {"legendonly"}
    assert {t["visible"] for t in named(draw_plane(map_of(3, is_reach_exact=True)), "reach")} == {True}


def test_two_axes_have_one_scale_and_fewer_show_the_threshold():
    layout = draw_plane(map_of(3))["layout"]
    assert layout["yaxis"]["scaleanchor"] == "x"
    layout = draw_plane(map_of(2, num_axes=1, reaches=()))["layout"]
    assert "scaleanchor" not in layout["yaxis"]
    assert layout["shapes"][0]["y0"] == 0.0
    assert layout["yaxis"]["range"][0] < 0 < layout["yaxis"]["range"][1]


def test_under_the_pointer_a_question_tells_its_decision():
    assert tell_question(QUESTION).split("<br>") == [
        "<b>why?</b>", "task: t0", "nearest: t0", "weights: t0 1.00", "distance 1.50, threshold 9.00",
    ]  # fmt: skip
    other = dataclasses.replace(
        QUESTION,
        text="word " * 100,
        task="t9",
        is_of_store=False,
        weights=(),
        region="t1",
        threshold=math.inf,
    )
    *words, task, nearest, weights, distance, region = tell_question(other).split("<br>")
    assert all(len(line) <= 60 + len("<b></b>") for line in words)
    assert words[-1].endswith("…</b>")
    assert (task, nearest) == ("task: t9 (not learned)", "nearest: t0")
    assert weights == "abstained: no task's knowledge was used"
    assert (distance, region) == ("distance 1.50", "drawn in the region of t1")
    assert "not said" in tell_question(dataclasses.replace(QUESTION, task=None))
    assert "t0 (misrouted)" in tell_question(dataclasses.replace(QUESTION, task="t1"))


def test_words_of_a_question_stay_words():
    evil = dataclasses.replace(QUESTION, text='</script><script>alert(1)</script> <a href="javascript:x">')
    told = tell_question(evil)
    assert "<script" not in told
    assert "</script" not in told
    assert "<a" not in told
    assert "&lt;script&gt;alert(1)" in told


def test_cells_tell_counts_and_shares_and_right_from_wrong():
    (heat,) = draw_confusion(confusion_of(3))["data"]
    assert heat["text"][0] == ["9<br>90%", "1<br>10%", "", ""]
    assert heat["z"][0] == pytest.approx([0.9, -(0.1**0.5), 0, 0])
    assert heat["hovertext"][2][0] == "task t2<br>given t0<br>1 of 10 questions (10.0%)"


def test_to_refuse_is_right_only_for_tasks_never_learned():
    strange = Confusion(("t0", "far"), 1, ("t0", "abstained"), ((3, 1), (1, 3)))
    figure = draw_confusion(strange)
    (heat,) = figure["data"]
    assert heat["z"] == [[0.75, -0.5], [-0.5, 0.75]]
    assert [(shape.get("x0"), shape.get("y0")) for shape in figure["layout"]["shapes"]] == [
        (0.5, 0),
        (0, 0.5),
    ]
    assert strange.mistakes() == [("t0", "abstained", 1, 4), ("far", "t0", 1, 4)]


def test_with_very_many_tasks_the_matrix_leaves_out_cell_texts_and_some_names():
    figure = draw_confusion(confusion_of(150))
    assert figure["data"][0]["texttemplate"] == ""
    for axis in ("xaxis", "yaxis"):
        names = figure["layout"][axis]["ticktext"]
        assert len(names) <= NUM_TICKS + 1
        assert names[-1].startswith(("abstained", "t149"))
    assert len(confusion_of(150).mistakes()) == 150


def test_cells_of_many_rows_have_no_room_for_shares():
    rows = tuple(f"t{i}" for i in range(20))
    (heat,) = draw_confusion(Confusion(rows, 1, ("t0", "abstained"), ((3, 1),) * 20))["data"]
    assert heat["text"][0] == ["3", "1"]
