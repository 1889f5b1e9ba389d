"""Quantised frozen weights: 8 or 4 bits on the device, while activations and increments stay floats.

Only weights are quantised, never activations, so a row is still computed as it would be alone: bitsandbytes'
own 8-bit product would also round activations, and pick columns by what the whole batch holds.
Codes are made from the checkpoint's own values, so they depend neither on the dtype nor on the machine's.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from slm.backbone.targets import LINEAR, find_stacks
from slm.errors import BackboneError

PACKAGES = {"int8": "torchao", "bnb-int8": "bitsandbytes", "bnb-4bit": "bitsandbytes"}
"""What quantises, by setting."""

_NOTES = {
    "torchao": "Failed to load",
    "torch.utils._pytree": "is an Enum subclass",
    "bitsandbytes.backends.cpu.ops": "Failed to load",
}
"""What packages tell of kernels for other machines; transformers imports them wherever they are installed."""


def _silence(logger: str, note: str) -> None:
    logging.getLogger(logger).addFilter(lambda record: note not in record.getMessage())


for _logger, _note in _NOTES.items():
    _silence(_logger, _note)


def loading_options(
    source: str, hf_config: Any, wanted: str, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Keyword arguments of ``from_pretrained`` for weights that are to be quantised, or are it already.

    Args:
        source: what the user called the backbone.
        hf_config: its transformers config.
        wanted: ``none`` or a key of :data:`PACKAGES`.
        device: where it will be computed.
        dtype: of the activations.

    Raises:
        BackboneError: the package is missing, or the checkpoint is quantised already.
    """
    method = stored_method(hf_config)
    if wanted == "none":
        if method is None:
            return {"dtype": dtype}
        return {"dtype": "auto", **({} if method == "torchao" else {"device_map": {"": device}})}
    if method is not None:
        raise BackboneError(
            f"backbone {source!r} is quantised by {method} already: set backbone.quantization to 'none'"
        )
    package = PACKAGES[wanted]
    if importlib.util.find_spec(package) is None:
        raise BackboneError(
            f"backbone.quantization {wanted!r} needs the package {package}: pip install --no-deps {package}"
        )
    settings = {"int8": _torchao, "bnb-int8": _bnb_8bit, "bnb-4bit": _bnb_4bit}[wanted](dtype)
    placed = {} if package == "torchao" else {"device_map": {"": device}}
    return {"dtype": "auto", "quantization_config": settings, **placed}


def stored_method(hf_config: Any) -> str | None:
    """What quantised the weights a config is of; None for floats.

    Raises:
        BackboneError: the config describes quantised weights without saying by what.
    """
    settings = getattr(hf_config, "quantization_config", None)
    if settings is None:
        return None
    if not isinstance(settings, dict):
        method = settings.quant_method
    elif settings.get("load_in_8bit") or settings.get("load_in_4bit"):
        method = "bitsandbytes"  # whose first checkpoints did not name it
    else:
        method = settings.get("quant_method")
    if method is None:
        raise BackboneError(
            f"the config.json of {hf_config.name_or_path!r} has a quantization_config without quant_method: "
            "add the name of the method that quantised the weights"
        )
    return str(getattr(method, "value", method))


def _torchao(dtype: torch.dtype) -> Any:
    """One scale per output feature, weights alone."""
    import transformers
    from torchao.quantization import Int8WeightOnlyConfig

    # The compiler's settings are the process's business, not a backbone's.
    return transformers.TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))


def _bnb_8bit(dtype: torch.dtype) -> Any:
    import transformers

    return transformers.BitsAndBytesConfig(load_in_8bit=True)


def _bnb_4bit(dtype: torch.dtype) -> Any:
    """NF4: the code of normally distributed weights, one scale per 64 of them."""
    import transformers

    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def settle(source: str, model: nn.Module, dtype: torch.dtype) -> None:
    """Make a model loaded as quantised ready: floats in ``dtype``, layers that autograd passes through.

    Raises:
        BackboneError: none of its blocks' layers is quantised.
    """
    if stored_method(model.config) is None:
        return
    for parameter in model.parameters():
        if not is_quantised(parameter):
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        _settle_torchao(module, dtype)
        _settle_bitsandbytes(module, dtype)
    stacks = find_stacks(model)
    layers = [m for _, stack in stacks for m in stack.modules() if isinstance(m, LINEAR)]
    if not any(is_quantised(layer.weight) for layer in layers):
        raise BackboneError(
            f"backbone {source!r} keeps the weights of its blocks in {type(layers[0]).__name__}, which int8 "
            "leaves as floats: set backbone.quantization to 'bnb-int8', 'bnb-4bit' or 'none'"
        )


def _settle_torchao(layer: Any, dtype: torch.dtype) -> None:
    """Let codes say that they stand for the activations' dtype: T5 casts its activations to what they say."""
    for name, weight in list(layer.named_parameters(recurse=False)):
        if hasattr(weight, "__tensor_flatten__") and weight.dtype != dtype:
            names, described = weight.__tensor_flatten__()
            parts = {part: getattr(weight, part) for part in names}
            described = {**described, "dtype": dtype}
            told = type(weight).__tensor_unflatten__(parts, described, weight.shape, weight.stride())
            setattr(layer, name, nn.Parameter(told, requires_grad=False))


def _settle_bitsandbytes(layer: Any, dtype: torch.dtype) -> None:
    if type(layer).__name__ == "Linear8bitLt":
        if layer.weight.CB is not None:
            layer.init_8bit_state()
        layer.forward = partial(_weight_only, layer)
    elif type(layer).__name__ == "Linear4bit":
        # On some processors it would pack its weights anew, into a form without gradients.
        layer.support_avx512bf16_for_cpu = False
        layer.compute_dtype = dtype


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is kept as codes."""
    is_plain = weight.is_floating_point() and type(weight.data) is Tensor
    return not is_plain or hasattr(weight, "quant_state")  # four-bit codes may be stored as floats


def _weight_only(layer: Any, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
    """W x + bias from bitsandbytes' codes and row scales, W = codes · scale / 127, with x as it is."""
    codes, scales = layer.state.CB, layer.state.SCB
    y: Tensor = nn.functional.linear(x, codes.to(x.dtype)) * (scales / 127).to(x.dtype)
    return y if layer.bias is None else y + layer.bias


def stored_parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that an entry of a state dict is made of: itself, or codes and scales."""
    inner = getattr(tensor, "__tensor_flatten__", None)
    if inner is None:
        yield name, tensor
        return
    for part in inner()[0]:
        yield from stored_parts(f"{name}.{part}", getattr(tensor, part))
