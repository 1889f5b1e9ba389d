import json
import os
import shutil
import subprocess
import sys

import pytest

from slm.answer import Candidate, Explanation
from tests.cli.conftest import BAD, GOOD

REVIEW = "a wonderful film, clever and moving"


def document(result):
    assert (result.code, result.err) == (0, "")
    return json.loads(result.out)


@pytest.fixture(scope="module")
def scratch(store, tmp_path_factory):
    """A copy of the store that a test may change."""
    return shutil.copytree(store, tmp_path_factory.mktemp("scratch") / "notes")


def test_init_makes_a_store_with_the_settings_of_file_and_command_line(slm, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("retrieval:\n  top_k: 3\n  min_weight: 0.1\nlearning:\n  learning_rate: 3e-3\n")
    made = document(slm("init", tmp_path / "new", "--config", file, "--set", "retrieval.top_k=1", "--json"))
    assert made["backbone"] == "minilm"
    assert made["kind"] == "encoder"
    assert (made["config"]["retrieval"]["top_k"], made["config"]["retrieval"]["min_weight"]) == (1, 0.1)
    assert made["config"]["learning"]["learning_rate"] == 3e-3


def test_init_makes_a_store_on_a_quantised_backbone(slm, tmp_path):
    pytest.importorskip("torchao")
    made = document(slm("init", tmp_path / "new", "--set", "backbone.quantization=int8", "--json"))
    assert made["config"]["backbone"]["quantization"] == "int8"
    wrong = slm("init", tmp_path / "other", "--set", "backbone.quantization=int4")
    assert (wrong.code, wrong.out) == (1, "")
    assert "quantization must be one of none, int8, bnb-int8, bnb-4bit, got 'int4', did you mean" in wrong.err
    assert not (tmp_path / "other").exists()


def test_init_says_what_comes_next(slm, tmp_path):
    folder = tmp_path / "new"
    result = slm("init", folder, "--backbone", "minilm")
    assert (result.code, result.err) == (0, "")
    assert result.out == (
        f"made the store {folder} for the encoder backbone minilm\nnext: slm learn {folder} NAME SOURCE\n"
    )
    listed = slm("tasks", folder)
    assert listed.out == f"no tasks yet: slm learn {folder} NAME SOURCE\n"


def test_show_prints_three_examples_as_the_model_sees_them_and_learns_nothing(slm, store, data):
    source = data / "films" / "train.jsonl"
    shown = document(slm("learn", store, "other", source, "--show", "--json"))
    assert shown["examples"] == [
        f"[CLS] {GOOD[0]} [SEP] ⟶ good",
        f"[CLS] {BAD[0]} [SEP] ⟶ bad",
        f"[CLS] {GOOD[1]} [SEP] ⟶ good",
    ]
    assert slm("learn", store, "other", source, "--show").out == "\n\n".join(shown["examples"]) + "\n"
    assert [task["task"] for task in document(slm("tasks", store, "--json"))] == ["films"]


def test_learn_measures_the_test_examples_and_forget_removes_the_task(slm, scratch, data):
    source, test = data / "films" / "train.jsonl", data / "films" / "test.jsonl"
    report = document(
        slm(
            "learn",
            scratch,
            "again",
            source,
            "--test",
            test,
            "--epochs",
            1,
            "--limit",
            12,
            "--seed",
            3,
            "--json",
        )
    )
    assert (report["task"], report["kind"], report["num_examples"]) == ("again", "classification", 12)
    assert report["num_epochs"] == 1
    assert 0 <= report["test_score"] <= 1
    assert report["test_metric"] == "accuracy"

    gone = slm("forget", scratch, "again")
    assert gone == (0, "forgot again, films is left\n", "")


def test_forget_asks_on_a_terminal(slm, store):
    result = slm("forget", store, "films", stdin=b"n\n", is_terminal=True)
    assert (result.code, result.out) == (1, "")
    assert result.err.endswith("slm: nothing was forgotten\n")
    assert "Forget films (24 examples) for good?" in result.err
    assert document(slm("tasks", store, "--json"))


def test_forget_takes_yes_for_an_answer(slm, scratch, data):
    copy = shutil.copytree(scratch, scratch.parent / "copy")
    result = slm("forget", copy, "films", "--json", stdin=b"y\n", is_terminal=True)
    assert (result.code, json.loads(result.out)) == (0, {"forgotten": "films", "tasks": []})


def test_ask_takes_its_questions_from_arguments_a_file_or_standard_input(slm, store, tmp_path):
    file = tmp_path / "questions.txt"
    file.write_text(f"{REVIEW}\n\n{BAD[0]}\n")
    options = ("--task", "films", "--json")
    by_argument = document(slm("ask", store, REVIEW, BAD[0], *options))
    by_file = document(slm("ask", store, "--file", file, *options))
    by_stdin = document(slm("ask", store, *options, stdin=file.read_bytes()))
    by_rows = document(
        slm("ask", store, *options, stdin=f'{{"text": "{REVIEW}"}}\n{{"text": "{BAD[0]}"}}\n'.encode())
    )
    assert by_argument == by_file == by_stdin == by_rows
    assert [answer["text"] for answer in by_argument] == ["good", "bad"]
    assert by_argument[0]["tasks"] == [["films", 1.0]]
    assert not by_argument[0]["is_abstained"]


def test_ask_prints_answer_confidence_and_retrieved_tasks(slm, store):
    result = slm("ask", store, REVIEW, "--task", "films")
    answer, source = result.out.splitlines()
    assert answer == "good"
    assert source.startswith("confidence 0.")
    assert source.endswith("; films 1.00")


def test_ask_says_that_it_abstained(slm, store):
    strange = "xylem 4711 §§ quark-gluon plasma; SELECT * FROM t WHERE id = 7"
    two = slm("ask", store, strange, GOOD[0])
    assert two.out.splitlines()[:2] == [strange, "abstained: this belongs to no learned task"]
    assert two.out.splitlines()[-1] == "slm explain shows why, --task NAME answers all the same"
    assert document(slm("ask", store, strange, "--json"))[0]["text"] is None


STRANGE = "xylem 4711 §§ quark-gluon plasma; SELECT * FROM t WHERE id = 7"


def test_explain_draws_the_decision(slm, store):
    explained = document(slm("explain", store, GOOD[0], "--json"))
    (films,) = explained["candidates"]
    assert films["task"] == "films"
    assert set(films) == {"task", "weight", "probability", "distance", "threshold"}
    header, row, verdict = slm("explain", store, GOOD[0]).out.splitlines()
    assert header.split() == [
        "task", "distance", "|", "threshold", "distance", "threshold", "posterior", "weight", "verdict",
    ]  # fmt: skip
    name_and_bar, numbers = row.split("│")
    assert name_and_bar.split()[0] == "films"
    assert set(name_and_bar.removeprefix("films")) <= {"█", " "}
    expected = [f"{films['distance']:.3f}", f"{films['threshold']:.3f}", "1.00", "1.00", "used"]
    assert numbers.split() == expected
    assert verdict == "answers with films 1.00"


def test_explain_says_why_it_abstained(slm, store):
    (films,) = document(slm("explain", store, STRANGE, "--json"))["candidates"]
    near, limit = f"{films['distance']:.3f}", f"{films['threshold']:.3f}"
    _, row, verdict = slm("explain", store, STRANGE).out.splitlines()
    assert verdict == f"abstained: films is nearest and too far: {near}, its threshold is {limit}"
    assert row.endswith("too far")
    assert "░" in row.split("│")[1]
    assert "\x1b" not in row


def test_of_many_tasks_explain_shows_the_nearest_dozen(slm, store, monkeypatch):
    many = tuple(Candidate(f"task-{i}", float(i == 0), float(i == 0), 3.0 * i - 5, 10.0) for i in range(100))
    found = Explanation("why", many, False)
    monkeypatch.setattr("slm.model.ScalableLM.explain", lambda *_, **__: found)
    _, *rows, left_out, verdict = slm("explain", store, "why").out.splitlines()
    assert [row.split()[0] for row in rows] == [f"task-{i}" for i in range(12)]
    assert [row.split()[-1] for row in rows] == ["used", *["reach"] * 5, *["far"] * 6]
    assert left_out == "88 farther tasks are left out, --json has them all"
    assert verdict == "answers with task-0 1.00"
    assert len(document(slm("explain", store, "why", "--json"))["candidates"]) == 100


def test_explain_tells_of_a_runoff(slm, store, monkeypatch):
    rivals = (Candidate("bills", 0.8, 0.8, 1.0, 10.0), Candidate("loans", 0.2, 0.2, 9.0, 10.0))
    monkeypatch.setattr(
        "slm.model.ScalableLM.explain", lambda *_, **__: Explanation("why", rivals, False, True)
    )
    *_, told, verdict = slm("explain", store, "why").out.splitlines()
    assert told == "two tasks claimed it, a runoff between them decided for bills"
    assert verdict == "answers with bills 0.80, loans 0.20"
    assert document(slm("explain", store, "why", "--json"))["is_contested"] is True


def test_explain_draws_in_ascii_where_the_output_has_no_blocks(store):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "slm.cli.main", "explain", str(store), STRANGE]
    done = subprocess.run(command, capture_output=True, env=environment, check=True)
    _, row, _ = done.stdout.decode("ascii").splitlines()
    before, after, *_ = row.removeprefix("films").split("|")
    assert set(before) == {"#", " "}
    assert "." in after


def test_evaluate_measures_the_store(slm, store, data):
    measured = document(slm("evaluate", store, data, "--tasks", "films", "--limit", 4, "--json"))
    assert measured["tasks"] == ["films"]
    assert measured["num_rows"] == [4]
    assert measured["forgetting"] is None
    picture = data / "matrix.png"
    printed = slm("evaluate", store, data, "--plot", picture).out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert printed.splitlines()[0].split() == [
        "task", "metric", "rows", "first", "last", "oracle", "misrouted",
    ]  # fmt: skip
    assert "average " in printed


def test_tasks_lists_what_was_learned(slm, store):
    (listed,) = document(slm("tasks", store, "--json"))
    assert (listed["task"], listed["kind"], listed["labels"]) == ("films", "classification", ["bad", "good"])
    row = slm("tasks", store).out.splitlines()[1].split()
    assert row[:6] == ["films", "classification", "bad,", "good", "24", "1"]


def test_doctor_reports_the_machine_and_a_whole_store(slm, store):
    found = document(slm("doctor", store, "--json"))
    assert found["problems"] == []
    assert set(found["versions"]) == {"python", "scalable-lm", "torch", "transformers", "lancedb"}
    assert found["dtype"] in ("float32", "bfloat16")
    assert found["models"]["minilm"] == "ok"
    assert slm("doctor").out.splitlines()[-1] == "no problems"


def test_doctor_repairs_what_a_cut_short_write_left_behind(slm, scratch):
    (scratch / "tasks" / ".tmp-0123").mkdir()
    broken = slm("doctor", scratch)
    assert broken.code == 1
    line = "problem: tasks/.tmp-0123 belongs to no task, a write was cut short: repair removes it"
    assert broken.out.splitlines()[-1] == line
    found = document(slm("doctor", scratch, "--repair", "--json"))
    assert found["repairs"] == ["removed tasks/.tmp-0123"]


def test_doctor_reports_a_damaged_file_as_json_and_exits_1(slm, scratch):
    file = next(scratch.glob("tasks/films-*/head.safetensors"))
    intact = file.read_bytes()
    file.write_bytes(intact[:-1] + b"\x7f")
    result = slm("doctor", scratch, "--json")
    file.write_bytes(intact)
    assert (result.code, result.err) == (1, "")
    assert len(json.loads(result.out)["problems"]) == 1


def test_learn_draws_the_loss_of_learned_keys(slm, tmp_path, data):
    folder, picture = tmp_path / "notes", tmp_path / "keys.png"
    slm("init", folder, "--set", "retrieval.form=cosine", "--set", "retrieval.cosine.min_steps=20")
    learned = slm(
        *("learn", folder, "films", data / "films" / "train.jsonl", "--epochs", 1, "--json"),
        *("--plot-keys", picture),
    )
    assert learned.code == 0
    assert len(json.loads(learned.out)["key_history"]["losses"]) == 20
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_export_writes_an_adapter_or_a_checkpoint_and_import_takes_an_adapter(slm, scratch, data, tmp_path):
    made = document(slm("export", scratch, "films", "-o", tmp_path / "adapter", "--json"))
    assert (made["folder"], made["format"]) == (str(tmp_path / "adapter"), "peft")
    assert made["files"] == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "head.safetensors",
        "slm.json",
    ]
    whole = slm("export", scratch, "films=1.0", "-o", tmp_path / "whole", "--merged")
    assert (whole.code, whole.err) == (0, "")
    assert whole.out.startswith(f"wrote films to {tmp_path / 'whole'}\n")
    assert (tmp_path / "whole" / "model.safetensors").is_file()

    examples = data / "films" / "train.jsonl"
    report = document(slm("import", scratch, tmp_path / "adapter", "--examples", examples, "--json"))
    assert (report["task"], report["kind"], report["num_examples"]) == ("adapter", "classification", 24)
    again = slm(
        "import",
        scratch,
        tmp_path / "adapter",
        "--examples",
        examples,
        "--name",
        "more",
        "--labels",
        "bad, good",
    )
    assert (again.code, again.err) == (0, "")
    assert again.out.startswith("imported more (classification, found by 24 examples)\nrank 8 on ")
    names = ["films", "adapter", "more"]
    assert [task["task"] for task in document(slm("tasks", scratch, "--json"))] == names
    for name in names[1:]:
        assert slm("forget", scratch, name).code == 0
