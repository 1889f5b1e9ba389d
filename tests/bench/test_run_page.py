"""Tables and page of a run, from cells made by hand."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from itertools import combinations
from statistics import stdev

import pytest

from slm.bench.baselines import NAMES
from slm.bench.cells import Cell, RunFolder
from slm.bench.run_figures import LOOKS, draw_confusions, draw_figures, look_of
from slm.bench.run_notes import drift_notes, notes
from slm.bench.run_page import write_report
from slm.bench.run_text import (
    COLUMNS,
    captions,
    command_of,
    describe_cells,
    drift_rows,
    leaderboard_table,
    markdown,
)
from slm.bench.tables import leaderboard, side_by_side
from slm.errors import DataError

RUN = {
    "suite": "long",
    "version": 1,
    "title": "Two <tasks>",
    "preset": "cpu",
    "about": "seconds of LoRA",
    "backbone": "minilm",
    "options": {"test": 4},
    "digest": "d",
    "data": {},
    "bytes_per_task_of_1_percent": 1500.0,
}


def cell(method, order, scores, *, seed=0, per_label=None, confusion=None, drift=None, **flags):
    tasks = [order.removeprefix("alone-")] if order.startswith("alone-") else ["news", "films"]
    if order == "2":
        tasks.reverse()
    return {
        "cell": {"method": method, "order": order, "seed": seed, "per_label": per_label},
        "title": method.upper(),
        "needs_task_id": method == "oracle",
        "is_joint": method == "joint",
        "replayed_share": 0.0,
        "tasks": tasks,
        "metrics": ["accuracy"] * len(tasks),
        "num_examples": [6] * len(tasks),
        "scores": scores,
        "learn_s": [1.0] * len(tasks),
        "size_bytes": [1000 * (i + 1) for i in range(len(tasks))],
        "ask_s": 2.0,
        "num_asked": 20,
        "retrieve_s": None if confusion is None else 0.5,
        "confusion": confusion,
        "num_refused": [1] + [0] * (len(tasks) - 1),
        "drift": drift,
        "settings": {},
        "environment": {"commit": "c" * 40, "device": "cpu"},
        "time_s": 3.0,
        **flags,
    }


RESULTS = [
    cell("slm", "1", [[0.9], [0.8, 0.7]], confusion=[[9, 1], [0, 10]]),
    cell("slm", "2", [[0.7], [0.7, 0.9]], confusion=[[10, 0], [0, 10]]),
    cell("oracle", "1", [[0.9], [0.9, 0.7]]),
    cell("oracle", "2", [[0.7], [0.7, 0.9]]),
    cell("joint", "1", [[0.95, 0.85]]),
    cell("slm", "alone-news", [[0.85]]),
    cell("slm", "alone-films", [[0.6]]),
]


def page_of(results, folder):
    run_folder = RunFolder(folder)
    run_folder.begin(RUN)
    for result in results:
        run_folder.keep(Cell(**result["cell"]), result)
    return write_report(folder).read_text()


def line_of(method, results=RESULTS):
    return next(line for line in leaderboard(results) if line.method == method)


def test_means_spreads_and_gaps_are_those_of_the_formulas():
    slm = line_of("slm")
    assert slm.average.mean == pytest.approx(0.775)
    assert slm.average.deviation == pytest.approx(stdev([0.75, 0.8]))
    assert slm.when_learned.mean == pytest.approx(0.8)
    assert slm.forgetting.mean == pytest.approx(0.05)
    assert slm.backward_transfer.mean == pytest.approx(-0.05)
    assert slm.oracle_gap.mean == pytest.approx(0.025)
    assert slm.misrouting.mean == pytest.approx(0.025)
    assert slm.refused.mean == pytest.approx(0.05)
    assert slm.bytes_per_task == 1000
    assert slm.retrieval_share == pytest.approx(0.25)
    assert slm.scores == pytest.approx({"films": 0.7, "news": 0.85})
    # the second task of each order, less what it reaches alone
    assert slm.forward_transfer.mean == pytest.approx(((0.7 - 0.6) + (0.9 - 0.85)) / 2)


def test_tasks_learned_alone_are_no_finished_run():
    with pytest.raises(DataError, match="the run has no finished cell yet"):
        leaderboard(RESULTS[-2:])


def test_bounds_stand_last_and_a_joint_method_has_no_forgetting():
    assert [line.method for line in leaderboard(RESULTS)] == ["slm", "joint", "oracle"]
    joint = line_of("joint")
    assert joint.average.mean == pytest.approx(0.9)
    assert joint.average.deviation is None
    assert joint.forgetting is None
    assert joint.when_learned is None


def test_without_an_oracle_there_is_no_gap_and_without_single_tasks_no_transfer():
    line = line_of("slm", RESULTS[:2])
    assert line.oracle_gap is None
    assert line.forward_transfer is None
    header, rows = leaderboard_table([line])
    assert "forward transfer" not in header
    assert rows[0][header.index("oracle gap")] == "–"


def test_forward_transfer_does_without_the_first_task_and_says_of_how_many_cells_it_is():
    found = [*RESULTS[:2], RESULTS[6]]  # films alone: enough for order 1, whose first task is news
    slm = line_of("slm", found)
    assert slm.forward_transfer.mean == pytest.approx(0.7 - 0.6)
    assert slm.forward_transfer.num_cells == 1
    assert "Forward transfer is of those cells alone whose tasks were learned alone too: SLM (1 of 2)." in (
        notes_of(found)
    )
    assert "Forward transfer" not in notes_of(RESULTS)


def test_numbers_of_examples_are_lines_of_their_own():
    few = cell("slm", "1", [[0.5], [0.5, 0.5]], per_label=4)
    many = cell("slm", "1", [[0.6], [0.6, 0.6]], per_label=16)
    assert [line.per_label for line in leaderboard([many, few])] == [4, 16]
    assert leaderboard_table(leaderboard([many, few]))[0][1] == "of each label"
    whole = cell("slm", "1", [[0.7], [0.7, 0.7]])
    _, rows = leaderboard_table(leaderboard([whole, many, few]))
    assert [row[1] for row in rows] == ["4", "16", "all"]


def test_drift_is_told_as_the_change_against_the_frozen_backbone():
    frozen = cell(
        "frozen", "1", [[0.1], [0.1, 0.1]], drift={"loss": 3.0, "scores": {"x": 0.5}, "abstained": 0.0}
    )
    bent = cell("slm", "1", [[0.1], [0.1, 0.1]], drift={"loss": 3.25, "scores": {"x": 0.4}, "abstained": 1.0})
    header, rows = drift_rows([bent, frozen])
    assert header == ("method", "loss on unrelated texts", "x, zero-shot", "refused")
    assert rows[0] == ("FROZEN", "3.000 (+0.000)", "50.0 (+0.0)", "0%")
    assert rows[1] == ("SLM", "3.250 (+0.250)", "40.0 (-10.0)", "100%")
    assert drift_rows(RESULTS) is None


def drift(loss, **scores):
    return {"loss": loss, "scores": scores, "abstained": 0.0}


def test_drift_after_different_numbers_of_examples_is_told_apart():
    line = [[0.1], [0.1, 0.1]]
    results = [
        cell("slm", "1", line, per_label=64, drift=drift(3.5, x=0.2)),
        cell("slm", "1", line, per_label=16, drift=drift(3.25, x=0.4)),
        cell("frozen", "1", line, per_label=16, drift=drift(3.0, x=0.5)),
    ]
    header, rows = drift_rows(results)
    assert header[:2] == ("method", "of each label")
    assert rows == [
        ("FROZEN", "16", "3.000 (+0.000)", "50.0 (+0.0)", "0%"),
        ("SLM", "16", "3.250 (+0.250)", "40.0 (-10.0)", "0%"),
        ("SLM", "64", "3.500 (+0.500)", "20.0 (-30.0)", "0%"),
    ]


def test_columns_in_which_nothing_can_be_lost_are_named(tmp_path):
    line = [[0.1], [0.1, 0.1]]
    results = [
        cell("frozen", "1", line, drift=drift(3.0, x=0.0, y=0.5, z=0.0)),
        cell("slm", "1", line, drift=drift(3.0, x=0.1, y=0.5, z=0.0)),
    ]
    told = "The frozen backbone scores 0 on x and z: these columns can show what a method gained, but no loss"
    assert drift_notes(results)[0].startswith(told)
    assert told in markdown(RUN, results)
    assert told in page_of(results, tmp_path)
    assert drift_notes(results[1:]) == []
    assert drift_notes([cell("frozen", "1", line, drift=drift(3.0, x=0.1))]) == []


def test_the_command_repeats_what_was_run():
    assert command_of(RUN, RESULTS) == (
        "slm bench long --preset cpu --data DATA --test 4 --methods joint,oracle,slm --orders 1,2 --seeds 0 "
        "--alone --out runs/x"
    )


def test_the_command_names_the_file_of_a_suite_of_one_s_own():
    own = {**RUN, "suite": "mine"}
    assert command_of({**own, "suite_file": "my suites/mine.yaml"}, RESULTS).startswith(
        "slm bench 'my suites/mine.yaml' --preset cpu"
    )
    assert command_of(own, RESULTS).startswith("slm bench FILE.yaml --preset cpu")


def test_the_command_repeats_the_part_of_a_curve_that_was_run():
    results = [cell("slm", "1", [[0.1], [0.1, 0.1]]) for _ in range(2)]
    for result, shots in zip(results, (64, 16), strict=True):
        result["cell"]["per_label"] = shots
    assert "--seeds 0 --shots 16,64 --out" in command_of(RUN, results)


def test_pictures_side_by_side_are_of_one_order():
    results = [
        cell("slm", "1", [[0.9], [0.8, 0.7]]),
        cell("slm", "2", [[0.7], [0.7, 0.9]]),
        cell("ewc", "2", [[0.7], [0.1, 0.2]]),
        cell("replay-1", "1", [[0.7], [0.1, 0.2]]),
        cell("oracle", "2", [[0.7], [0.7, 0.9]]),
    ]
    figures = draw_figures(results, leaderboard(results))
    assert {ax.get_title() for ax in figures["matrices"].axes if ax.get_title()} == {"SLM", "EWC", "ORACLE"}
    lines = {line.get_label(): line for line in figures["curves"].axes[0].lines}
    assert lines.keys() == {"SLM", "EWC", "ORACLE"}


def test_curves_are_of_the_orders_that_all_methods_have():
    results = [*RESULTS[:4], cell("ewc", "1", [[0.9], [0.1, 0.2]])]
    lines = {
        line.get_label(): line for line in draw_figures(results, leaderboard(results))["curves"].axes[0].lines
    }
    assert list(lines["SLM"].get_ydata()) == pytest.approx([90, 75])


def test_every_method_has_a_look_of_its_own():
    assert LOOKS.keys() == set(NAMES)
    assert len({look.colour for look in LOOKS.values()}) == len(NAMES)
    assert len({(look.marker, look.is_bound) for look in LOOKS.values()}) == len(NAMES)
    assert max(LOOKS, key=lambda name: (LOOKS[name].layer, LOOKS[name].width)) == "slm"
    dashed = [name for name, look in LOOKS.items() if look.style["linestyle"] != "-"]
    assert max(dashed, key=lambda name: LOOKS[name].width) == "oracle"


def test_a_method_looks_the_same_beside_any_others():
    for results in (RESULTS, RESULTS[:2]):
        figures = draw_figures(results, leaderboard(results))
        own = next(line for line in figures["curves"].axes[0].lines if line.get_label() == "SLM")
        assert (own.get_color(), own.get_marker()) == (LOOKS["slm"].colour, LOOKS["slm"].marker)
    assert look_of("one of an older version").colour


def costs_axes(*sizes, learn_s=1.0):
    results = [
        cell(name, "1", [[0.9], [0.8, 0.7]], size_bytes=[0, size], learn_s=[learn_s, learn_s])
        for name, size in zip(("slm", "oracle", "frozen"), sizes, strict=False)
    ]
    figure = draw_figures(results, leaderboard(results))["costs"]
    figure.canvas.draw()
    return figure.axes[:2]


def ticks(ax):
    low, high = ax.get_xlim()
    shown = zip(ax.get_xticks(), ax.get_xticklabels(), strict=True)
    return [label.get_text() for place, label in shown if low <= place <= high]


def test_costs_that_span_less_than_a_decade_are_plain_numbers_from_zero():
    left, right = costs_axes(4e6, 4.01e6)
    assert left.get_xlim()[0] == 0
    assert ticks(left)[0] == "0.0"
    assert 3 <= len(ticks(left)) <= 8
    assert ticks(right)[0] == "0.0"
    # with room beside the last point, however near the others are
    assert left.get_xlim()[1] > 4.2 / 2


def test_a_method_that_keeps_nothing_stands_at_zero():
    left, right = costs_axes(4e4, 4e7, 0, learn_s=4e-6)
    assert ticks(left) == ["0", "0.01", "0.1", "1", "10", "100"]
    assert min(line.get_xdata()[0] for line in left.lines) == 0
    assert max(line.get_xdata()[0] for line in right.lines) == 0
    # whole beside the frame
    assert left.get_xlim()[0] < 0
    assert right.get_xlim()[0] < 0
    assert ticks(costs_axes(4e4, 4e7)[0]) == ["0.01", "0.1", "1", "10", "100"]


def test_learning_takes_a_mean_and_a_deviation_over_cells():
    results = [RESULTS[0], {**RESULTS[1], "learn_s": [2.0, 4.0]}]
    header, rows = leaderboard_table(leaderboard(results))
    assert rows[0][header.index("learn, s per task")] == "2.0 ± 1.4"
    bars = draw_figures(results, leaderboard(results))["costs"].axes[1].collections
    assert [float(x) for x in bars[0].get_segments()[0][:, 0]] == pytest.approx([2 - 2**0.5, 2 + 2**0.5])


def test_matrices_of_many_tasks_hold_their_values_and_curves_count_tasks_in_whole_numbers():
    tasks = [f"t{i}" for i in range(12)]
    many = cell("slm", "1", [[0.5] * (i + 1) for i in range(12)], tasks=tasks, learn_s=[1.0] * 12)
    few = cell("slm", "1", [[0.9], [0.8, 0.7]])
    figure = draw_figures([many], leaderboard([many]))["matrices"]
    assert len(figure.axes[0].texts) == 12 * 13 / 2
    for result in (many, few):
        ax = draw_figures([result], leaderboard([result]))["curves"].axes[0]
        assert all(place == int(place) for place in ax.get_xticks())
        assert 0 < ax.get_xlim()[0] < 1


def test_the_label_of_the_colour_bar_is_not_cut():
    figure = draw_confusions([{**RESULTS[0], "tasks": ["a", "b", "c"], "confusion": [[1, 0, 0]] * 3}] * 3)
    figure.canvas.draw()
    box = figure.axes[-1].yaxis.label.get_window_extent()
    assert box.y0 >= 0
    assert box.y1 <= figure.bbox.height


def test_figures_are_of_one_number_of_examples():
    results = [
        cell(method, order, [[score], [score, score]], per_label=number)
        for method, score in (("slm", 0.5), ("ewc", 0.3))
        for order in ("8", "10")
        for number in (4, 16)
        if (method, number) != ("ewc", 16)
    ]
    # both have 4 examples, slm alone has 16
    figures = draw_figures(results, leaderboard(results))
    assert {line.get_label() for line in figures["curves"].axes[0].lines} == {"SLM", "EWC"}
    assert [r["cell"] for r in side_by_side(results)] == [
        {"method": m, "order": "8", "seed": 0, "per_label": 4} for m in ("slm", "ewc")
    ]


def notes_of(results, run=RUN):
    return "\n".join(notes(run, results))


def test_cells_are_told_with_their_test_rows_and_what_one_answer_is_worth():
    told = "orders 1, 2; seed 0; 6 examples a task; 10 test rows a task, so one answer is worth "
    assert describe_cells(RESULTS) == told + "5.00 points of a cell's average"
    uneven = [{**result, "num_asked": 19} for result in RESULTS[:1]]
    assert describe_cells(uneven).endswith(
        "about 10 test rows a task, so one answer is worth about 5.26 points of a cell's average"
    )


def test_a_method_that_some_cells_lack_is_named_with_them():
    assert "Means of fewer cells than others': JOINT without order 2." in notes_of(RESULTS)
    assert "fewer cells" not in notes_of(RESULTS[:4])
    assert "fewer cells" not in notes_of([RESULTS[0], RESULTS[2], RESULTS[5]])
    line = [[0.5], [0.5, 0.5]]
    seeds = [cell("slm", "1", line, seed=seed, per_label=4) for seed in (0, 1)]
    other = cell("ewc", "1", line, per_label=4)
    assert "EWC without order 1 of seed 1." in notes_of([*seeds, other])
    more = cell("ewc", "1", line, per_label=16)
    assert "SLM without order 1 with 16 examples of each label." in notes_of([seeds[0], other, more])


def test_cells_of_other_settings_are_counted_and_named():
    assert "settings" not in notes_of([{**result, "digest": "d"} for result in RESULTS])
    strange = [{**RESULTS[0], "digest": "e"}, {**RESULTS[1], "digest": "e"}, *RESULTS[2:]]
    assert "differ, are 2 of 7 cells: SLM (2)." in notes_of(strange)


def test_an_oracle_of_another_commit_is_told():
    assert "commit" not in notes_of(RESULTS)
    newer = {"commit": "d" * 40, "device": "cpu"}
    found = notes_of([{**RESULTS[0], "environment": newer}, *RESULTS[1:]])
    assert "Of another commit than the oracle's cell beside them are 1 of 7 cells: SLM (1)." in found
    # learned alone, which no oracle is beside
    assert "commit" not in notes_of([*RESULTS[:6], {**RESULTS[6], "environment": newer}])


def test_a_commit_is_shortened_and_keeps_that_it_had_changes(tmp_path):
    results = [{**r, "environment": {"commit": "c" * 40 + " with changes", "device": "cpu"}} for r in RESULTS]
    assert "Commit cccccccccccc with changes; cpu." in markdown(RUN, results)
    assert "<dt>commit</dt><dd>cccccccccccc with changes</dd>" in page_of(results, tmp_path)


def test_the_time_of_all_cells_stands_under_the_leaderboard():
    assert "7 cells, computed in 2.5 hours in all." in notes_of([{**r, "time_s": 9000 / 7} for r in RESULTS])


FEW = [
    cell(method, order, [[score], [score, score]], per_label=number, num_examples=[2 * number] * 2)
    for number, score in ((4, 0.5), (16, 0.6))
    for method in ("slm", "oracle")
    for order in ("8", "10")
]
RUN_OF_FEW = {**RUN, "per_label_of_1_percent": 4, "num_examples_of_1_percent": 16}


def test_every_number_of_examples_has_its_table_of_tasks_and_its_1_percent():
    text = markdown(RUN_OF_FEW, FEW)
    few = text.index("points of 100; 4 examples of each label.")
    assert few < text.index("| SLM | 50.0 | 50.0 |") < text.index("100; 16 examples of each label.")
    assert "| SLM | 60.0 | 60.0 |" in text
    assert "takes 1.5 kB on average with 4 examples of each label, about 6.0 kB with 16 examples" in text
    assert "takes 1.5 kB on average.\n" in markdown(RUN, RESULTS)


def test_captions_say_of_which_orders_seeds_and_examples_figures_are():
    told = captions(FEW)
    for name in ("matrices", "confusion"):
        assert told[name].endswith("Shown: order 8; seed 0; 16 examples of each label, 32 examples a task.")
    for name in ("curves", "costs"):
        assert "Shown: orders 8, 10; seed 0; 16 examples of each label" in told[name]
    assert "4 and 16 examples of each label" in told["shots"]
    third = captions([*FEW, cell("ewc", "8", [[0.1], [0.1, 0.1]], per_label=64)])["shots"]
    assert "4, 16 and 64 examples of each label" in third
    lacking = [*FEW, cell("ewc", "9", [[0.1], [0.1, 0.1]], per_label=4)]
    assert captions(lacking)["matrices"].endswith("Not among them: EWC.")


def test_the_bytes_of_1_percent_are_reckoned_from_the_number_they_were_measured_for():
    def told(**run):
        return notes_of(FEW, {**RUN, **run})

    measured = {"per_label_of_1_percent": 64, "num_examples_of_1_percent": 120}
    assert (
        "takes 1.5 kB on average with 64 examples of each label, about 0.2 kB with 4 examples of each label, "
        "about 0.8 kB with 16 examples of each label."
    ) in told(**measured)
    # A run of an older version measured the preset's first number, 16 for this one.
    assert (
        "takes 1.5 kB on average with 16 examples of each label, about 0.4 kB with 4 examples of each label."
    ) in told(preset="few-shot")
    assert "1.5 kB on average with 4 examples of each label, about 6.0 kB with 16" in told(suite="mine")
    # Nothing to reckon from: no cell has all examples.
    assert "takes 1.5 kB on average with all examples.\n" in told()


def test_an_average_that_no_order_changes_is_told_to_say_nothing_of_its_certainty():
    told = "The average is the same in every order for ORACLE: all orders ask the same test rows, so a"
    assert told in notes_of(RESULTS)
    seeds = [cell("slm", "1", [[0.5], [0.5, 0.5]], seed=seed) for seed in (0, 1)]
    assert "in every order" not in notes_of(seeds)
    assert "for SLM with 4 examples of each label; ORACLE with 4" in notes_of(FEW)


def test_a_caption_speaks_of_the_oracle_where_it_is_drawn():
    assert "distance to the oracle's" in captions(RESULTS)["curves"]
    assert "oracle" not in captions(RESULTS[:2])["curves"]


def test_a_number_of_examples_that_only_joint_methods_have_is_reported(tmp_path):
    joint = cell("joint", "1", [[0.9, 0.9]], per_label=256)
    few = cell("slm", "1", [[0.5], [0.5, 0.5]], per_label=16)
    assert captions([few, joint]).keys() == {"costs", "confusion", "shots"}
    assert "<h2>Few examples</h2>" in page_of([few, joint], tmp_path / "both")
    assert "<h2>What it costs</h2>" in page_of([joint], tmp_path / "joint")


def test_every_column_of_the_leaderboard_is_explained(tmp_path):
    results = [*FEW, cell("slm", "alone-news", [[0.85]], per_label=4)]
    results += [cell("slm", "alone-films", [[0.6]], per_label=4)]
    header, _ = leaderboard_table(leaderboard(results))
    assert set(header[1:]) == COLUMNS.keys()
    page = page_of(RESULTS, tmp_path)
    assert all(f"<dt>{name}</dt>" in page for name in COLUMNS if name != "of each label")
    assert "<dt>of each label</dt>" not in page
    assert "* **kB per task**: " in (tmp_path / "report.md").read_text()


def test_a_page_follows_the_reader_s_colours_and_fits_a_phone(tmp_path):
    page = page_of(RESULTS, tmp_path)
    assert "color-scheme: light dark" in page
    assert "@media (prefers-color-scheme: dark)" in page
    narrow = page[page.index("@media (max-width: 700px)") : page.index("</style>")]
    assert "td:first-child { min-width: 7rem; max-width: 9rem;" in narrow
    assert "figure svg { max-width: none; }" in narrow
    assert page.count('style="min-width: ') == page.count("<svg")


def test_columns_where_large_is_best_sort_so_at_the_first_click(tmp_path):
    page = page_of(RESULTS, tmp_path)
    found = re.findall(r"<th scope=col data-best=large><button>([^<]*)", page)
    assert found == ["average", "when learned", "backward transfer", "forward transfer", "films", "news"]


@pytest.mark.skipif(shutil.which("node") is None, reason="runs the page's script")
def test_dashes_sort_last_both_ways(tmp_path):
    page = page_of(RESULTS, tmp_path)
    script = page[page.index("const number") : page.index("for (const button")]
    values = '["–", "1,000", "2.27% ± 0.1", "–", "-0.8", "all"]'
    for sign, told in (
        ("1", ["-0.8", "2.27% ± 0.1", "1,000", "all", "–", "–"]),
        ("-1", ["all", "1,000", "2.27% ± 0.1", "-0.8", "–", "–"]),
    ):
        asked = f"{script} console.log(JSON.stringify({values}.sort((x, y) => compare(x, y, {sign}))))"
        found = subprocess.run(["node", "-e", asked], capture_output=True, text=True, check=True).stdout
        assert json.loads(found) == told


def test_markdown_has_every_method_and_the_command_under_the_table():
    text = markdown(RUN, RESULTS)
    assert "| SLM | 77.50 ± 3.54 | 80.00 ± 0.00 | 5.00 ± 7.07 |" in text
    assert "JOINT (bound)" in text
    assert text.startswith("## Two <tasks>: preset cpu\n\nSeconds of LoRA. Backbone")
    assert text.index("slm bench long") > text.index("JOINT (bound)")


def test_the_page_is_whole_escapes_its_texts_and_needs_no_network(tmp_path):
    page = page_of(RESULTS, tmp_path)
    assert "<h1>Two &lt;tasks&gt;</h1>" in page
    assert page.count("<svg") == 4  # curves, costs, matrices, routing
    assert not re.search(r"(src|href)=\"?https?:", re.sub(r'xmlns(:\w+)?="[^"]*"', "", page))
    assert {p.name for p in tmp_path.glob("*.png")} == {
        "curves.png", "costs.png", "matrices.png", "confusion.png",
    }  # fmt: skip
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["leaderboard"][0]["average"] == "77.50 ± 3.54"
    assert write_report(tmp_path).read_text() == page


def test_a_run_without_a_finished_cell_has_no_report(tmp_path):
    RunFolder(tmp_path).begin(RUN)
    with pytest.raises(DataError, match="no finished cell yet"):
        write_report(tmp_path)


# Linear colours as people without one kind of cones see them (Machado, Oliveira and Fernandes 2009).
SIGHTS = (
    ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
    ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304)),
)


def cie_lab(colour, sight):
    import numpy as np

    part = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.434, 0.376, 0.190], [0.213, 0.715, 0.072], [0.018, 0.109, 0.873]])
    x, y, z = np.cbrt(to_xyz @ np.clip(np.array(sight) @ linear, 1e-3, 1))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", SIGHTS)
def test_colours_of_methods_in_use_differ_for_every_kind_of_sight(sight):
    seen = {name: cie_lab(look.colour, sight) for name, look in LOOKS.items() if not look.is_bound}
    near = {(a, b): ((seen[a] - seen[b]) ** 2).sum() ** 0.5 for a, b in combinations(seen, 2)}
    assert min(near.values()) > 12, min(near, key=near.get)
