"""Where what can be made again is kept: a folder of the user's own, with or without a home."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest
import torch

from slm.backbone import kernel
from slm.backbone.cache import cache_folder
from slm.errors import BackboneError


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    """A user without a home, and the place of temporary folders."""

    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SLM_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", fail)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def fresh_kernel():
    for cached in (kernel.row_kernel, kernel._library):
        cached.cache_clear()
    yield
    for cached in (kernel.row_kernel, kernel._library):
        cached.cache_clear()


def test_it_is_what_the_environment_says_else_below_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("SLM_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("SLM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "slm"


def test_without_a_home_it_is_a_temporary_folder_of_this_user_alone(homeless):
    folder = cache_folder()
    assert folder == homeless / f"slm-{os.geteuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert cache_folder() == folder


def test_a_folder_that_others_can_write_into_is_refused(homeless):
    folder = homeless / f"slm-{os.geteuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    said = r"slm-\d+ is not a folder of this user alone: set SLM_CACHE to one$"
    with pytest.raises(BackboneError, match=said):
        cache_folder()
    folder.rmdir()
    (homeless / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(homeless / "elsewhere")
    with pytest.raises(BackboneError, match=said):
        cache_folder()


def test_without_any_folder_the_plain_ways_remain(homeless, monkeypatch, fresh_kernel):
    monkeypatch.setattr(tempfile, "tempdir", str(homeless / "missing"))
    with pytest.raises(BackboneError, match=r"^there is no home folder and no temporary one .*: set SLM_C"):
        cache_folder()
    assert kernel.row_kernel(torch.float32) is None


def test_without_a_home_the_kernel_is_compiled_all_the_same(homeless, fresh_kernel):
    if kernel.row_kernel(torch.float32) is None:
        pytest.skip("there is no compiler")
    assert list(homeless.glob("slm-*/kernels/*.so"))
