"""``slm map``, its output and its wrong inputs."""

import json

import pytest

from tests.cli.conftest import GOOD, film_rows, write_rows

STRANGE = "xylem 4711 §§ quark-gluon plasma; SELECT * FROM t WHERE id = 7"


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "questions.txt"
    path.write_text(f"{STRANGE}\n{GOOD[0]}\n")
    return path


def test_map_writes_a_page_and_tells_its_numbers(slm, store, data, questions, tmp_path):
    page = tmp_path / "new" / "map.html"
    result = slm("map", store, "-o", page, "--data", data, "--limit", 4, "--file", questions, "--json")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert found["file"] == str(page)
    assert (found["tasks"], found["num_keys"], found["num_questions"]) == (["films"], 1, 6)
    assert (found["misrouting"], found["agreement"], found["outsiders_let_in"]) == (0.0, 1.0, None)
    assert (found["confusion"]["tasks"], found["confusion"]["given"]) == (["films"], ["films", "abstained"])
    assert sum(found["confusion"]["counts"][0]) == 4  # the file's questions have no known task
    text = page.read_text()
    assert text.startswith("<!doctype html>")
    assert f"<title>Map of {store.name}</title>" in text
    again = slm("map", store, "-o", page, "--data", data)
    assert again.out.splitlines()[0] == f"wrote {page}: 1 tasks, 1 keys, 6 questions"
    assert again.out.splitlines()[1].startswith("misrouting 0.000, false refusals 0.")
    assert again.out.splitlines()[1].endswith("drawn in the region of their nearest task 1.000")


def test_map_draws_a_store_without_questions(slm, store, tmp_path):
    page = tmp_path / "map.html"
    assert slm("map", store, "-o", page) == (0, f"wrote {page}: 1 tasks, 1 keys, 0 questions\n", "")
    assert "Confusion matrix" not in page.read_text()


def test_tasks_that_the_store_never_learned_are_outsiders(slm, store, data, tmp_path):
    rows = [{"text": f"{i} plus {i}", "label": str(i % 2)} for i in range(12)]
    for part in ("train", "test"):
        write_rows(tmp_path / "sums" / f"{part}.jsonl", rows)
    found = json.loads(slm("map", store, "-o", tmp_path / "m.html", "--data", tmp_path, "--json").out)
    assert found["confusion"]["tasks"] == ["sums"]
    let_in, refused = found["confusion"]["counts"][0]
    assert found["outsiders_let_in"] == let_in / (let_in + refused)
    assert found["misrouting"] is None


def refused(result, message, code=1):
    assert result == (code, "", f"slm: {message}\n")


def test_what_cannot_be_drawn_is_one_line(slm, store, data, tmp_path):
    page = tmp_path / "map.html"
    refused(
        slm("map", store, "-o", tmp_path / "map.png"),
        f"{tmp_path / 'map.png'} is no .html file, which a map is: name one, such as map.html",
    )
    (tmp_path / "file").touch()
    refused(
        slm("map", store, "-o", tmp_path / "file" / "map.html"),
        f"{tmp_path / 'file' / 'map.html'} cannot be written (Not a directory): name a file in a folder you "
        "may write to",
    )
    refused(slm("map", store), "Missing option '--output' / '-o': see slm map --help", code=2)
    refused(
        slm("map", store, "-o", page, "--limit", 3),
        "Invalid value: --limit needs --data: see slm map --help",
        code=2,
    )
    refused(
        slm("map", tmp_path, "-o", page),
        f"{tmp_path} is not a store (it has no store.json): give the folder of a store",
    )
    refused(
        slm("map", store, "-o", page, "--data", tmp_path),
        f"{tmp_path} holds no tasks, expected <name>/train.jsonl inside it: check the path",
    )
    nothing = slm("map", store, "-o", page, "--data", data, "--limit", 0)
    assert nothing.code == 2
    assert nothing.err.startswith("slm: Invalid value for '--limit': ")
    write_rows(tmp_path / "untested" / "films" / "train.jsonl", film_rows())
    refused(
        slm("map", store, "-o", page, "--data", tmp_path / "untested"),
        'task "films" has no test examples: load it with a test file',
    )
    empty = tmp_path / "empty"
    assert slm("init", empty).code == 0
    refused(
        slm("map", empty, "-o", page),
        f"store {empty} has no task yet, so there is nothing to draw: learn one",
    )
    assert not page.exists()
