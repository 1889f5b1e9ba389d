"""How the process is set up before a command runs: quiet libraries, streams that cannot surprise."""

from __future__ import annotations

import io
import os
import sys

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
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Send what is still unwritten nowhere: its reader is gone, and Python would complain at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
