"""Where a machine keeps what it can make again: converted weights, the compiled row kernel."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from slm.errors import BackboneError


def cache_folder() -> Path:
    """``$SLM_CACHE``, else ``~/.cache/slm``; without a home, a private folder among the temporary ones.

    Raises:
        BackboneError: there is no home, and no private folder can be had either.
    """
    given = os.environ.get("SLM_CACHE")
    if given:
        return Path(given)
    try:
        return Path.home() / ".cache" / "slm"
    except RuntimeError:  # HOME is unset, and the user has no entry in passwd
        return _private_folder()


def _private_folder() -> Path:
    """A folder among the temporary ones that this user alone can write into: code is loaded from it."""
    if os.name == "nt":  # there each user has temporary folders of their own
        return Path(tempfile.gettempdir()) / "slm"
    user = os.geteuid()
    try:
        folder = Path(tempfile.gettempdir()) / f"slm-{user}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise BackboneError(
            f"there is no home folder and no temporary one to write into ({error.strerror}): set SLM_CACHE"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o077:
        raise BackboneError(f"{folder} is not a folder of this user alone: set SLM_CACHE to one")
    return folder
