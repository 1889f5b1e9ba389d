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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_threads_give_the_bits_of_one(dtype, monkeypatch):
    function = kernel.row_kernel(dtype)
    if function is None:
        pytest.skip("there is no compiler")
    num_rows, num_tokens, num_slots, rank, num_in, num_out = 7, 5, 2, 8, 1100, 300
    draw = torch.Generator().manual_seed(0)
    down, up = (torch.randn(9, rank, n, generator=draw).to(dtype) for n in (num_in, num_out))
    x = torch.randn(num_rows, num_tokens, num_in, generator=draw).to(dtype)
    slots = torch.randint(9, (num_rows, num_slots), generator=draw)
    weights = torch.rand(num_rows, num_slots, generator=draw)
    sizes = num_rows, num_tokens, num_slots, rank, rank, num_in, num_out
    parts = down, up, slots, weights, torch.arange(num_rows)
    bent = []
    for num_threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=num_threads: n)
        call = kernel.kernel_call(parts, sizes)
        assert call[-1] == num_threads
        y = torch.zeros(num_rows, num_tokens, num_out, dtype=dtype)
        function(x.data_ptr(), y.data_ptr(), call)
        bent.append(y)
    assert bent[0].abs().sum() > 0
    assert torch.equal(*bent)
