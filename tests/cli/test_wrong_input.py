"""Wrong inputs. Each asserts the whole of standard error, which is one line, and the exit code."""

import json
import shutil
from pathlib import Path

import pytest

from slm.backbone import load
from tests.cli.conftest import film_rows, write_rows

LONG = "word " * 600


def assert_refused(result, message, code=1):
    assert result == (code, "", f"slm: {message}\n")
    assert "Traceback" not in result.err


@pytest.fixture
def films(data) -> Path:
    return data / "films" / "train.jsonl"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A BERT of two small random layers with MiniLM's tokenizer."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(load.locate("minilm"))
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
        architectures=["BertModel"],
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "{path} is empty, at least 1 row is needed: add rows"),
        (
            '{"text": "a", "label": "x"}\n{"text": "b", "label": y}\n',
            "{path} line 2: broken JSON at column 24 (Expecting value): mend it or delete it",
        ),
        (
            '{"text": "a", "label": "x"}\n{"text": "b", "label": 1}\n',
            "{path} line 2: two label types, line 1 has 'x' and line 2 has 1 (int), allowed is one type for "
            "the whole file: write every label as text",
        ),
        (
            '{"question": "a", "answer": "x"}\n',
            "{path} line 1: columns question, answer have no known shape, allowed is text + label, prompt + "
            "completion, messages, or instruction + output (input optional): rename or drop columns",
        ),
        (
            '{"text": "a", "label": "x"}\n',
            "{path}: every row has the label 'x', a classification needs at least 2 labels: add rows of "
            'another label or set kind to "generation"',
        ),
        (
            b'{"text": "caf\xe9", "label": "x"}\n',
            "{path} line 1, byte 14: 0xe9 is not UTF-8: save the file as UTF-8",
        ),
    ],
    ids=["empty", "broken JSON", "two label types", "unknown shape", "one label", "not UTF-8"],
)
def test_a_file_that_cannot_be_learned_is_refused(slm, store, tmp_path, content, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(slm("learn", store, "new", path), message.format(path=path))


def test_a_missing_file_is_refused(slm, store, tmp_path):
    path = tmp_path / "missing.jsonl"
    message = f"{path} does not exist, expected a file (.csv, .json, .jsonl or .parquet): check the path"
    assert_refused(slm("learn", store, "new", path), message)
    assert_refused(slm("ask", store, "--file", path), message)


def test_a_text_longer_than_the_window_is_refused_with_its_number(slm, store, tmp_path):
    path = write_rows(tmp_path / "long.jsonl", [*film_rows(), {"text": LONG, "label": "good"}])
    mend = "shorten it, or allow cutting its middle out (--truncate, is_truncating=True)"
    assert_refused(
        slm("learn", store, "new", path),
        f"example 25 of task 'new' ({path} line 25) has 602 tokens, the window holds 512: {mend}",
    )
    too_long = f"has 602 tokens, the window holds 512: {mend}"
    assert_refused(slm("ask", store, "fine", LONG), f"question 2 {too_long}")
    assert_refused(slm("explain", store, LONG), f"question 1 {too_long}")
    assert slm("ask", store, LONG, "--truncate").code == 0


def test_a_loss_that_is_not_a_number_stores_nothing(slm, tiny, films, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny, tmp_path / "damaged")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layer.1.output.dense.weight"))
    weights[name] = torch.full_like(
        weights[name], float("nan")
    )  # above the layer that the query is read from
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    store = tmp_path / "store"
    assert slm("init", store, "--backbone", folder, "--set", "retrieval.layers=[1]").code == 0
    assert_refused(
        slm("learn", store, "films", films),
        "the loss became nan while learning, so nothing was stored: lower learning_rate (0.0005) or look for "
        "odd texts",
    )
    assert slm("tasks", store, "--json").out == "[]\n"


def test_a_store_of_another_backbone_is_refused(slm, tiny, tmp_path):
    store = tmp_path / "store"
    made = json.loads(slm("init", store, "--backbone", tiny, "--json").out)
    manifest = json.loads((store / "store.json").read_text())
    (store / "store.json").write_text(json.dumps(manifest | {"backbone_source": "minilm"}))
    minilm = json.loads(slm("init", tmp_path / "other", "--json").out)["fingerprint"]
    assert_refused(
        slm("ask", store, "a question"),
        f"store {store} was made with backbone 'minilm' (fingerprint {made['fingerprint'][:12]}), got "
        f"'minilm' ({minilm[:12]}): open it with the backbone it was made with",
    )


@pytest.mark.parametrize(
    "command", [("ask", "a question"), ("tasks",), ("forget", "films"), ("explain", "why")]
)
def test_a_folder_that_is_no_store_is_refused(slm, tmp_path, command):
    verb, *rest = command
    assert_refused(
        slm(verb, tmp_path, *rest),
        f"{tmp_path} is not a store (it has no store.json): give the folder of a store",
    )
    missing = tmp_path / "missing"
    assert_refused(
        slm(verb, missing, *rest), f"no store at {missing}: make one with slm init or correct the path"
    )


def test_doctor_tells_that_a_folder_is_no_store(slm, tmp_path):
    result = slm("doctor", tmp_path)
    problem = f"{tmp_path} is not a store (it has no store.json): give the folder of a store"
    assert (result.code, result.err) == (1, "")
    assert result.out.splitlines()[-1] == f"problem: {problem}"


def test_an_unknown_task_is_refused_with_the_nearest_name(slm, store):
    message = f"no task 'film' among the 1 tasks of {store}: did you mean films?"
    assert_refused(slm("ask", store, "a question", "--task", "film"), message)
    assert_refused(slm("forget", store, "film", "--yes"), message)


def test_an_unknown_task_of_a_data_folder_is_refused_with_the_nearest_name(slm, store, data):
    assert_refused(
        slm("evaluate", store, data, "--tasks", "film"),
        "task 'film' is unknown, known are films: did you mean \"films\"?",
    )


def test_a_task_that_was_never_learned_cannot_be_evaluated(slm, store, data, tmp_path):
    folder = shutil.copytree(data / "films", tmp_path / "film-reviews").parent
    assert_refused(
        slm("evaluate", store, folder),
        "the model never learned 'film-reviews' of the stream, learned are films: learn it first or leave "
        "it out",
    )


def test_a_name_that_is_learned_already_is_refused(slm, store, films):
    assert_refused(
        slm("learn", store, "films", films),
        "task 'films' is already learned: forget it first or choose another name",
    )


def test_a_name_with_forbidden_characters_is_refused(slm, store, films):
    assert_refused(
        slm("learn", store, "Films!", films),
        "task name 'Films!' is not allowed: use 1 to 64 of a-z, 0-9, dot, hyphen and underscore, the first "
        "one a letter or a digit",
    )


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("retrieval.top_q=1", "unknown setting 'top_q', did you mean 'top_k'?"),
        ("retrieval.top_k=0", "RetrievalConfig: top_k must be in 1..64, got 0: correct these settings"),
        ("retrieval=1", "retrieval must be a mapping of settings, got 1"),
        ("top_k", "setting 'top_k' has no value: write --set name=value, such as retrieval.top_k=1"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_made(slm, tmp_path, assignment, message):
    assert_refused(slm("init", tmp_path / "new", "--set", assignment), message)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.json", '{"retrieval":\n ?}', "{path} line 2, column 2: broken JSON (Expecting value): mend it"),
        ("s.yaml", "- 1", "{path} must hold settings by name, got a list: see slm init --help"),
        ("s.yaml", None, "{path} cannot be read (No such file or directory): check the path"),
    ],
)
def test_a_file_that_holds_no_settings_is_refused(slm, tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    assert_refused(slm("init", tmp_path / "new", "--config", path), message.format(path=path))


def test_an_encoder_is_not_asked_to_write(slm, store, tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "a", "completion": "b"}] * 12)
    assert_refused(
        slm("learn", store, "pairs", path),
        "task 'pairs' asks for free text, which the encoder 'minilm' cannot write: use a causal or "
        "sequence-to-sequence backbone, 'smollm2' say",
    )


def test_init_refuses_a_folder_that_is_not_empty(slm, tmp_path):
    (tmp_path / "letter.txt").write_text("keep me")
    assert_refused(
        slm("init", tmp_path),
        f"{tmp_path} is not empty: open it if it is a store, or choose another folder",
    )


@pytest.fixture
def fake_weights(tmp_path, monkeypatch) -> Path:
    """Another file in the place of MiniLM's weights."""
    weights = tmp_path / "fake_minilm" / "model" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    (tmp_path / "fake_minilm" / "__init__.py").touch()
    weights.write_bytes(b"not the published weights")
    packaged = load.PackagedModel("fake_minilm", "fake-minilm", "model", weights.name, "0" * 64)
    monkeypatch.setitem(load.ALIASES, "minilm", packaged)
    monkeypatch.syspath_prepend(tmp_path)
    return weights


def test_packaged_weights_with_another_hash_are_refused(slm, fake_weights, tmp_path):
    message = (
        f"{fake_weights} has sha256 {load.sha256_of(fake_weights)[:16]}..., expected 0000000000000000...: "
        "the weights are not the published ones, reinstall the package fake-minilm"
    )
    assert_refused(slm("init", tmp_path / "new"), message)
    found = json.loads(slm("doctor", "--json").out)
    assert found["problems"] == [message]


def test_a_backbone_whose_package_is_missing_is_refused(slm, tmp_path, monkeypatch):
    packaged = load.PackagedModel("no_such_module", "no-such-package", ".", "x.gguf", "0" * 64)
    monkeypatch.setitem(load.ALIASES, "other", packaged)
    assert_refused(
        slm("init", tmp_path / "new", "--backbone", "other"),
        "backbone 'other' needs the package no-such-package: pip install no-such-package",
    )


def test_a_backbone_nobody_can_reach_is_refused_in_one_line(slm, tmp_path):
    result = slm("init", tmp_path / "new", "--backbone", "no-such-owner/no-such-model")
    begin = "slm: backbone 'no-such-owner/no-such-model' cannot be loaded ("
    end = (
        "): give an alias (minilm, smollm2), a folder with a transformers model, a .gguf file or a hub id "
        "that this machine can reach\n"
    )
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(begin)
    assert result.err.endswith(end)
    assert result.err.count("\n") == 1  # between the two stands what the hub's library says


def test_an_empty_question_is_refused(slm, store):
    assert_refused(slm("ask", store, ""), "question 1 is empty: give it some text")
    assert_refused(slm("explain", store, "  "), "question 1 is empty: give it some text")


def test_standard_input_without_a_question_is_refused(slm, store):
    assert_refused(
        slm("ask", store, stdin=b"\n\n"), "input: no questions found, at least 1 is needed: write one a line"
    )


def test_standard_input_that_is_not_utf_8_is_refused(slm, store):
    assert_refused(
        slm("ask", store, stdin=b"fine\ncaf\xe9\n"),
        "input line 2, byte 4: 0xe9 is not UTF-8: save the file as UTF-8",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ask", "s", "--qq"), "No such option: --qq: see slm ask --help"),
        (
            ("learn", "--tset"),
            "No such option: --tset (Possible options: --seed, --start, --test): see slm learn --help",
        ),
        (("frobnicate",), "No such command 'frobnicate': see slm --help"),
        (("learn", "s", "name"), "Missing argument 'SOURCE': see slm learn --help"),
        (
            ("ask", "s", "q", "--file", "f"),
            "Invalid value: give questions or --file, not both: see slm ask --help",
        ),
        (("doctor", "--repair"), "Invalid value: --repair needs a STORE: see slm doctor --help"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(slm, arguments, message):
    assert_refused(slm(*arguments), message, code=2)


def test_keys_that_are_not_trained_cannot_be_drawn_and_nothing_is_learned(slm, store, data, tmp_path):
    source = data / "films" / "train.jsonl"
    result = slm("learn", store, "other", source, "--plot-keys", tmp_path / "keys.png")
    assert result.code == 1
    assert result.err.startswith("slm: keys of the gaussian form are computed, not trained")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_no_numbers_or_only_half_given_are_refused(slm, store, tmp_path):
    for tasks in (("films=x",), ("films=0.5", "other")):
        assert_refused(
            slm("export", store, *tasks, "-o", tmp_path / "out"),
            f"tasks {', '.join(tasks)} have weights that are no numbers: write each as NAME=WEIGHT, such as "
            "billing=0.7 legal=0.3, or none",
        )
    assert_refused(
        slm("export", store, "films", "films", "-o", tmp_path / "out"),
        "tasks films, films name one twice: give each once",
    )
    assert_refused(
        slm("export", store, "films=0.5", "-o", tmp_path / "out"),
        "weights must be above 0 with the sum 1, got films=0.5: correct them",
    )
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_adapter_is_refused(slm, store, films, tmp_path):
    assert_refused(
        slm("import", store, tmp_path, "--examples", films, "--name", "new"),
        f"{tmp_path} is not an adapter folder (no file adapter_config.json): "
        "it needs adapter_config.json and adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    assert_refused(
        slm("import", store, tmp_path, "--examples", films, "--name", "new"),
        f"{tmp_path / 'adapter_config.json'} has peft_type 'LOHA': only LORA and ADALORA can be imported, "
        "whose change of a layer is s · B A with matrices of its own",
    )
