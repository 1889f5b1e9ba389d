import torch

from slm.backbone.load import choose_dtype
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
