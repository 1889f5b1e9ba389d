"""The process ``slm``, whose own imports may be interrupted too; ``python -m slm`` is the same."""

from __future__ import annotations

import sys


def run() -> int:
    """Run the command line and return its exit code; an interrupt is one line, however early it comes."""
    try:
        from slm.cli.main import main

        return main()
    except KeyboardInterrupt:
        sys.stderr.write("slm: interrupted\n")
        return 130


if __name__ == "__main__":
    sys.exit(run())
