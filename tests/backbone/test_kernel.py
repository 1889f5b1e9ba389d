"""The row kernel is made where it can be, and nothing depends on it."""

from __future__ import annotations

import pytest
import torch

from slm.backbone import kernel


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing compiled yet, here or on disk."""
    monkeypatch.setenv("SLM_CACHE", str(tmp_path))
    for cached in (kernel.row_kernel, kernel._library):
        cached.cache_clear()
    yield tmp_path
    for cached in (kernel.row_kernel, kernel._library):
        cached.cache_clear()


def test_it_is_compiled_once_into_the_cache_folder(fresh, monkeypatch):
    if kernel.row_kernel(torch.bfloat16) is None:
        pytest.skip("there is no compiler")
    (made,) = (fresh / "kernels").iterdir()
    assert made.suffix == ".so"
    kernel.row_kernel.cache_clear()
    kernel._library.cache_clear()
    monkeypatch.setattr(kernel, "_compile", lambda *_: pytest.fail("compiled again"))
    assert kernel.row_kernel(torch.float32) is not None
    assert kernel.row_kernel(torch.float16) is None


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_working_compiler_there_is_none_and_no_error(fresh, monkeypatch, compiler):
    monkeypatch.setenv("CXX", compiler)
    assert kernel.row_kernel(torch.float32) is None
    assert not list(fresh.glob("kernels/*.so"))


def test_it_can_be_switched_off(fresh, monkeypatch):
    monkeypatch.setenv("SLM_KERNEL", "0")
    assert kernel.row_kernel(torch.float32) is None
    assert not list(fresh.iterdir())


def test_its_sources_agree_on_the_largest_rank():
    assert f"MAX_RANK = {kernel.MAX_RANK};" in kernel.SOURCE.read_text()
