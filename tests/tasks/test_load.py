"""Every file type and source, and what is said about each way a file can be wrong."""

import json
from pathlib import Path

import pytest

from slm.errors import ConfigError, TaskError
from slm.tasks import Example, Task, TaskKind
from slm.tasks.load import PARQUET_COPY, open_data_set

from .files import GOOD, NO_ROWS, lines, message_of, write

ROWS = [{"text": "great, really", "label": "good"}, {"text": 'so "dull"\nand long', "label": "bad"}]
EXAMPLES = (Example("great, really", "good"), Example('so "dull"\nand long', "bad"))
CSV = 'text,label\n"great, really",good\n"so ""dull""\nand long",bad\n'


def write_parquet(path: Path, rows: list[dict[str, object]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.csv", "data.parquet", "DATA.CSV"])
@pytest.mark.parametrize("as_text", [True, False])
def test_every_file_type_gives_the_same_task(tmp_path, name, as_text):
    path = tmp_path / name
    if name.endswith("parquet"):
        write_parquet(path, ROWS)
    else:
        content = {".jsonl": lines(*ROWS), ".json": json.dumps(ROWS), ".csv": CSV}[path.suffix.lower()]
        write(tmp_path, content, name)
    task = Task.load("films", str(path) if as_text else path)
    assert task == Task("films", TaskKind.CLASSIFICATION, EXAMPLES, ("bad", "good"))


def test_a_byte_order_mark_windows_line_ends_and_blank_lines_change_nothing(tmp_path):
    jsonl = write(tmp_path, b"\xef\xbb\xbf" + ("\r\n \r\n".join(map(json.dumps, ROWS)) + "\r\n\r\n").encode())
    table = write(tmp_path, "\ufefftext,label\r\n\r\na,x\r\n,\r\nb,y\r\n", "data.csv")
    assert Task.load("t", jsonl).examples == EXAMPLES
    assert Task.load("t", table).examples == (Example("a", "x"), Example("b", "y"))


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path):
    path = write(tmp_path, '{"prompt": "a\u2028b\u0085c", "completion": "d"}')
    assert Task.load("t", path).examples == (Example("a\u2028b\u0085c", "d"),)


def test_a_limit_draws_and_keeps_every_label(tmp_path):
    rows = [{"text": f"t{n}", "label": "abc"[n % 3]} for n in range(30)]
    path = write(tmp_path, lines(*rows))
    task = Task.load("t", path, limit=6, seed=5)
    assert sorted(example.target for example in task.examples) == list("aabbcc")
    assert task != Task.load("t", path, limit=6, seed=6)
    assert len(Task.load("t", path, limit=2).labels) == 3
    with pytest.raises(ConfigError, match="limit must be at least 1, got 0: raise it or leave it out"):
        Task.load("t", path, limit=0)


def test_a_test_file_is_read_whole_and_holds_no_new_label(tmp_path):
    path = write(tmp_path, lines(*ROWS))
    test = write(
        tmp_path, lines({"text": "a", "label": "good"}, {"text": "b", "label": "fair"}), "test.jsonl"
    )
    assert Task.load("t", path, test=path, limit=1).test == EXAMPLES
    assert message_of(path, test=test) == (
        "test.jsonl line 2: label 'fair' is none of those in the training data, bad, good: "
        "mend it or delete the line"
    )


def test_a_name_is_checked_before_the_file_is_read(tmp_path):
    with pytest.raises(TaskError, match="task name 'A' is not allowed"):
        Task.load("A", tmp_path / "missing.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "text,label\na,x\nb,y,z\n",
            "data.csv line 3: 3 fields found, the first line has 2: "
            'put texts with commas or line breaks in "double quotes"',
        ),
        (
            'text,label\n"a\nb",x\n"c,y\n',
            "data.csv line 4: broken CSV (unexpected end of data): mend the quotes, or save it as .jsonl",
        ),
        (
            'text,label\n"a\nb",x\n"",y\n',
            "data.csv line 4: \"text\" must be text that is not blank, got '': fill it in or delete the line",
        ),
        (
            "text,label\n",
            f"data.csv: {NO_ROWS}",
        ),
        (
            "a;b\nc;d\n",
            "data.csv line 1: columns are separated by semicolons, only commas are read: save it so",
        ),
    ],
)
def test_a_wrong_csv_file_is_refused_with_the_line_where_the_row_starts(tmp_path, content, message):
    assert message_of(write(tmp_path, content, "data.csv")) == message


def test_a_wrong_json_file_is_refused(tmp_path):
    assert message_of(write(tmp_path, json.dumps(GOOD), "data.json")) == (
        "data.json: a .json file must hold a list of objects, got {'text': 'a', 'label': 'x'} (dict): "
        "wrap the objects in [ ], or write one a line into a .jsonl file"
    )
    assert message_of(write(tmp_path, '[{"text": "a"},\n x]', "data.json")) == (
        "data.json: broken JSON at line 2, column 2 (Expecting value): mend it or delete it"
    )
    assert message_of(write(tmp_path, "[1]", "data.json")) == (
        "data.json row 1: expected an object, got 1 (int): mend the row"
    )
    deep = write(tmp_path, "[" * 100_000, "data.json")
    assert message_of(deep).startswith("data.json: JSON that cannot be read (")


def test_a_wrong_parquet_file_is_refused(tmp_path):
    path = write_parquet(tmp_path / "data.parquet", [GOOD, {"text": None, "label": "y"}])
    assert message_of(path) == (
        'data.parquet row 2: "text" must be text that is not blank, got nothing (null or NaN): '
        "fill it in as text or delete the row"
    )
    text = message_of(write(tmp_path, "no parquet at all", "data.parquet"))
    assert text.startswith("data.parquet is no readable Parquet file (")
    assert text.endswith("): write it again")


def test_a_source_that_is_no_data_file_is_refused(tmp_path):
    assert message_of(tmp_path / "none.jsonl") == (
        "none.jsonl does not exist, expected a file (.csv, .json, .jsonl or .parquet): check the path"
    )
    (tmp_path / "folder").mkdir()
    assert message_of(tmp_path / "folder") == (
        "folder is a folder, expected one file (.csv, .json, .jsonl or .parquet): name the file inside it"
    )
    assert message_of(write(tmp_path, "a", "notes.txt")) == (
        "notes.txt ends in '.txt', allowed is .csv, .json, .jsonl or .parquet: convert the "
        "file or mend its name"
    )
    assert message_of("reviews.jsonl").startswith("reviews.jsonl does not exist")
    assert message_of("data/reviews.tsv").startswith("data/reviews.tsv ends in '.tsv'")
    assert message_of("./data/films").startswith("data/films ends in ''")


def test_a_data_set_gives_the_names_of_its_labels(monkeypatch):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    parts = {
        "train": datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features),
        "test": datasets.Dataset.from_dict({"text": ["c"], "label": [1]}, features=features),
        "unlabelled": datasets.Dataset.from_dict({"text": ["c"], "label": [-1]}, features=features),
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda source, _, split: parts[split])
    task = Task.load("t", "owner/films", test="owner/films")
    assert task.examples == (Example("a", "pos"), Example("b", "neg"))
    assert task.test == (Example("c", "pos"),)
    assert task.labels == ("neg", "pos")
    assert message_of("owner/films", split="unlabelled") == (
        'data set owner/films (unlabelled) row 1: "label" must be text, a whole number or true/false, '
        "got nothing (null or NaN): mend it or delete the row"
    )


def test_a_configuration_of_the_hub_s_own_copy_is_a_folder(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **named: calls.append((args, named)))
    open_data_set("owner/films", "train", "old")
    open_data_set("owner/films", "train", "old", "main")
    open_data_set("owner/films", "train", "old", PARQUET_COPY)
    assert calls == [
        (("owner/films", "old"), {"split": "train"}),
        (("owner/films", "old"), {"split": "train", "revision": "main"}),
        (("owner/films", None), {"split": "train", "revision": "refs/convert/parquet", "data_dir": "old"}),
    ]


def test_a_data_set_that_cannot_be_loaded_is_refused_on_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fail(source, _, split):
        raise ConnectionError(f"no route to {source}\nwith details")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert message_of("owner/films") == (
        "data set owner/films (train) cannot be loaded (no route to owner/films): check the "
        "id, the split and "
        "the connection, or give a file (.csv, .json, .jsonl or .parquet)"
    )


def test_what_stands_twice_is_refused_rather_than_half_lost(tmp_path):
    path = write(tmp_path, "\ntext,label,text\na,x,b\n", "a.csv")
    assert message_of(path) == 'a.csv line 2: the column "text" stands twice: rename or drop one of the two'
    path = write(tmp_path, lines(GOOD) + '\n{"text": "a", "label": "x", "label": "y"}\n')
    twice = "stands twice in one object: drop one of the two"
    assert message_of(path) == f'data.jsonl line 2: "label" {twice}'
    path = write(tmp_path, '[{"messages": [{"role": "user", "role": "user", "content": "a"}]}]', "a.json")
    assert message_of(path) == f'a.json: "role" {twice}'


def test_an_example_knows_where_it_stands_but_is_the_same_anywhere(tmp_path):
    rows = lines(GOOD, GOOD | {"label": "y"})
    one, other = (write(tmp_path, rows, name) for name in ("a.jsonl", "b.jsonl"))
    task, same = Task.load("t", one), Task.load("t", other)
    assert [example.place for example in task.examples] == [f"{one} line 1", f"{one} line 2"]
    assert (task, task.digest()) == (same, same.digest())
