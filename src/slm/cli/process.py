"""How the process is set up before a command runs: quiet libraries, streams that cannot surprise."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

from slm.cli.output import print_failure

_QUIET = {
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}

_SPINS = "5000"
"""Rounds a thread waits awake for the others of its process. GNU OpenMP's own, which sees no other process,
is so long that two processes on the same cores (a server and its teaching job) mostly wait for each other."""


def set_up_process() -> None:
    """Set up libraries, unless the user's environment says otherwise, and standard streams.

    Libraries are silenced, and their threads let other processes have the cores; what this process starts
    inherits both. Nothing that computes may be loaded before.
    Input is UTF-8 whatever the locale, and strict, so that other bytes are reported rather than asked.
    Output never fails on a character its encoding lacks.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if "OMP_WAIT_POLICY" not in os.environ:  # the spin count would overrule it
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def is_of_output(error: Exception) -> bool:
    """Whether an error says that standard output can no longer be written."""
    if isinstance(error, BrokenPipeError):
        return True
    if not isinstance(error, OSError):
        return False
    try:
        sys.stdout.flush()
        os.write(1, b"")
    except OSError:
        return True
    return False


def give_up_output(error: OSError) -> int:
    """The exit code where standard output cannot be written; a reader that is gone is told nothing.

    What is still unwritten goes nowhere, for Python would complain of it at exit.

    Raises:
        OSError: that error, where it is of something else.
    """
    if not is_of_output(error):
        raise error
    if not isinstance(error, BrokenPipeError):
        print_failure(f"standard output cannot be written ({error.strerror}): write it elsewhere")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return 1
