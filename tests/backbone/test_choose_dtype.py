import pytest
import torch

from slm.backbone.load import choose_dtype, has_fast_bfloat16
from slm.config import BackboneConfig


def test_a_dtype_that_is_named_is_the_one_chosen():
    assert choose_dtype(BackboneConfig(device="cpu", dtype="bfloat16")) == (
        torch.device("cpu"),
        torch.bfloat16,
    )
    assert choose_dtype(BackboneConfig(device="cpu", dtype="float32")) == (torch.device("cpu"), torch.float32)


def test_auto_chooses_a_device_and_a_dtype_without_a_backbone():
    device, dtype = choose_dtype()
    assert device.type in ("cpu", "cuda")
    assert dtype in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("instructions", "is_fast"),
    [
        ({}, False),
        ({"avx512_bf16"}, True),
        ({"avx512_bf16", "avx512_fp16"}, False),
        ({"avx512_bf16", "avx512_fp16", "amx_bf16"}, True),
    ],
)
def test_bfloat16_is_fast_with_tiles_and_on_processors_that_were_never_built_with_any(
    monkeypatch, instructions, is_fast
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(instructions, True))
    assert has_fast_bfloat16() is is_fast


def test_a_processor_without_its_widest_vectors_has_no_fast_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert not has_fast_bfloat16()


def test_a_torch_that_names_no_instructions_has_no_fast_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not has_fast_bfloat16()
