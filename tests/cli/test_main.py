import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slm.cli import (
    ask,
    doctor,
    evaluate,
    explain,
    export,
    forget,
    import_,
    init,
    key,
    learn,
    map_,
    serve,
    tasks,
)
from slm.cli.interrupts import admitting
from slm.errors import DataError
from slm.store.tables import Tables

COMMANDS = (init, learn, ask, explain, evaluate, map_, tasks, forget, import_, export, serve, key, doctor)
SLM = (sys.executable, "-m", "slm.cli.main")


def name_of(module) -> str:
    return module.__name__.rpartition(".")[2].rstrip("_")


def test_help_takes_less_than_half_a_second():
    def seconds() -> float:
        """Processor time, which a busy machine does not stretch."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*SLM, "--help"], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(5)) < 0.5


def test_help_loads_no_torch():
    code = (
        "import sys; from slm.cli.main import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'lancedb', 'numpy', 'pyarrow', 'datasets'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else code)"
    )
    for arguments in (["--help"], ["learn", "--help"], ["--version"], ["no-such-command"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == (2 if arguments == ["no-such-command"] else 0), done.stderr


@pytest.mark.parametrize(
    ("chosen", "spins"),
    [({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
    ids=["by default", "a count of the user's", "a policy of the user's"],
)
def test_waiting_threads_let_other_processes_have_the_cores(slm, monkeypatch, chosen, spins):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    slm("--version")
    assert os.environ.get("GOMP_SPINCOUNT") == spins


@pytest.mark.parametrize("module", COMMANDS, ids=name_of)
def test_every_help_page_shows_its_two_examples_and_json(slm, module, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    page = slm(name_of(module), "--help")
    assert page.code == 0
    assert len(module.EXAMPLES) == 2
    for example in module.EXAMPLES:
        assert example.startswith(f"slm {name_of(module)}")
        assert example in page.out
    assert "--json" in page.out


def test_without_arguments_slm_shows_its_help(slm):
    assert slm().out == slm("-h").out
    assert "forget" in slm().out


def test_version_is_the_package_s(slm):
    import slm as package

    assert slm("--version") == (0, f"slm {package.__version__}\n", "")


def test_no_command_has_100_lines():
    folder = Path(init.__file__).parent
    files = [path for path in folder.glob("*.py") if path.name != "output.py"]  # what commands print with
    assert {path.name for path in files if len(path.read_text().splitlines()) >= 100} == set()


def raising(error: BaseException):
    def fail(*_, **__):
        raise error

    return fail


def test_an_interrupt_says_that_nothing_was_stored_where_something_might_have_been(
    slm, store, data, monkeypatch
):
    monkeypatch.setattr("slm.model.ScalableLM.open", raising(KeyboardInterrupt()))
    monkeypatch.setattr("slm.store.Store.forget", raising(KeyboardInterrupt()))
    films = data / "films" / "train.jsonl"
    assert slm("learn", store, "again", films) == (130, "", "slm: interrupted, nothing was stored\n")
    assert slm("ask", store, "why") == (130, "", "slm: interrupted\n")
    assert slm("forget", store, "films", "--yes") == (130, "", "slm: interrupted\n")


def test_an_interrupt_during_the_commit_says_that_the_task_is_stored(slm, store, data, tmp_path, monkeypatch):
    copy, films = shutil.copytree(store, tmp_path / "copy"), data / "films" / "train.jsonl"
    insert = Tables.insert

    def insert_and_interrupt(*arguments):
        signal.raise_signal(signal.SIGINT)
        return insert(*arguments)

    monkeypatch.setattr(Tables, "insert", insert_and_interrupt)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    result = slm("learn", copy, "again", films, "--epochs", 1)
    signal.signal(signal.SIGINT, handler)
    assert result == (1, "", "slm: interrupted, again is stored\n")
    assert json.loads(slm("tasks", copy, "--json").out)[-1]["task"] == "again"


def test_an_interrupt_after_the_commit_says_that_the_task_is_stored(slm, store, data, tmp_path, monkeypatch):
    copy, films = shutil.copytree(store, tmp_path / "copy"), data / "films" / "train.jsonl"
    monkeypatch.setattr("slm.model.ScalableLM.evaluate", raising(KeyboardInterrupt()))
    result = slm("learn", copy, "again", films, "--test", films, "--epochs", 1)
    assert result == (1, "", "slm: interrupted, again is stored but not measured\n")
    assert "again" in slm("tasks", copy).out


def test_a_defect_is_one_line_that_says_how_to_see_more(slm, store, monkeypatch):
    monkeypatch.setattr("slm.model.ScalableLM.open", raising(RuntimeError("odd\nthing")))
    more = "this is a defect, run with SLM_DEBUG=1 for the traceback"
    assert slm("ask", store, "why") == (1, "", f"slm: RuntimeError (odd thing): {more}\n")
    monkeypatch.setenv("SLM_DEBUG", "1")
    with pytest.raises(RuntimeError, match="odd"):
        slm("ask", store, "why")


@pytest.mark.skipif(os.name == "nt", reason="sends a signal")
def test_an_interrupt_from_outside_ends_the_process_with_130():
    # A shell that runs the tests in the background has its processes ignore interrupts.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from slm.cli.main import main; print('ready', flush=True); sys.exit(main(['ask', 's']))"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], **pipes)
    assert process.stdout.readline() == b"ready\n"
    for _ in range(10):
        time.sleep(0.3)  # it loads, or waits for questions
        process.send_signal(signal.SIGINT)
        try:  # a library being imported just then may swallow the first one
            process.wait(timeout=6)
            break
        except subprocess.TimeoutExpired:
            continue
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"slm: interrupted\n")


def test_an_interrupt_while_the_command_line_is_imported_is_one_line():
    code = (
        "import builtins, sys\nload = builtins.__import__\n"
        "def interrupted(name, *rest):\n"
        "    if name == 'typer': raise KeyboardInterrupt\n"
        "    return load(name, *rest)\n"
        "builtins.__import__ = interrupted\n"
        "from slm.__main__ import run\nsys.exit(run())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "slm: interrupted\n")
    version = subprocess.run([sys.executable, "-m", "slm", "--version"], capture_output=True, text=True)
    assert version.stdout.startswith("slm ")


@pytest.mark.skipif(os.name == "nt", reason="closes a pipe")
def test_what_fails_when_a_task_is_stored_says_that_it_is():
    with (
        pytest.raises(DataError, match=r"^films is stored but not measured: too long$"),
        admitting(None, "films", " but not measured"),
    ):
        raise DataError("too long")
    with pytest.raises(DataError, match=r"^too long$"), admitting(None, "films"):
        raise DataError("too long")


@pytest.mark.parametrize("more", ["", " --json"])
@pytest.mark.parametrize(("streams", "code"), [("> /dev/full", 1), (">&-", 0), ("<&-", 0), ("2>&-", 0)])
def test_streams_that_are_full_or_closed_give_at_most_one_line(more, streams, code):
    command = f"{sys.executable} -m slm bench list{more} {streams}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == code
    told = "slm: standard output cannot be written (No space left on device): write it elsewhere\n"
    assert done.stderr == (told if code else "")


def test_a_closed_pipe_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*SLM, "--version"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.stderr == ""
    done = subprocess.run(
        f"{sys.executable} -m slm.cli.main --help | head -1", shell=True, capture_output=True
    )
    assert done.stderr == b""
