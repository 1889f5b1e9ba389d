"""The command ``slm``: builds the app, runs it, and makes one line and an exit code of every failure."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.main import get_command

import slm
from slm.cli import bench
from slm.cli.output import print_failure
from slm.cli.process import give_up_output, is_of_output, set_up_process
from slm.errors import SlmError

# typer carries click under a name that differs between its versions; this class is public in all of them.
_UsageError: Any = typer.BadParameter.__base__

_INTERRUPTED = 130

app = typer.Typer(
    help="A language model that keeps learning: teach it task after task, ask without naming them.",
    epilog="Examples:\n\n  slm init notes\n\n  slm learn notes film-sentiment films.jsonl",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name in "init learn ask explain evaluate map_ tasks forget import_ export serve key doctor".split():  # noqa: SIM905
    _module = import_module(f"slm.cli.{_name}")
    _epilog = "\n\n  ".join(("Examples:", *_module.EXAMPLES))
    app.command(_name.rstrip("_"), epilog=_epilog)(getattr(_module, _name))
app.add_typer(bench.app, name="bench", epilog="\n\n  ".join(("Examples:", *bench.EXAMPLES)))


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"slm {slm.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``slm`` and return its exit code.

    0: done; 1: an :class:`SlmError`, a problem found by ``doctor``, or a defect; 2: wrong usage; 130:
    interrupted. A failure is one line on standard error; with SLM_DEBUG=1 it is a traceback.

    Args:
        arguments: what stands behind ``slm``; None takes the process's own.
    """
    set_up_process()
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            code = _run(list(sys.argv[1:] if arguments is None else arguments) or ["--help"])
        sys.stdout.flush()
    except OSError as error:
        return give_up_output(error)
    return code


def _run(arguments: list[str]) -> int:
    try:
        code = int(get_command(app).main(arguments, prog_name="slm", standalone_mode=False) or 0)
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "slm"
        print_failure(f"{error.format_message().rstrip('.')}: see {command} --help")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except Exception as error:  # whatever it is, a user gets one line
        if os.environ.get("SLM_DEBUG") or is_of_output(error):
            raise
        defect = "this is a defect, run with SLM_DEBUG=1 for the traceback"
        is_meant = isinstance(error, SlmError)
        print_failure(str(error) if is_meant else f"{type(error).__name__} ({error}): {defect}")
        return 1
    if code == _INTERRUPTED:  # learn and import themselves say what they had stored by then
        print_failure(f"interrupted{', nothing was stored' if arguments[0] in ('learn', 'import') else ''}")
    return code


if __name__ == "__main__":
    sys.exit(main())
