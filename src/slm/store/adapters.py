"""PEFT's LoRA and AdaLoRA adapters from elsewhere: any rank, alpha and layers, trusting nothing in them.

What an adapter changes is read off its tensors, so however its targets were written (a list, a regular
expression, "all-linear") needs no interpreting. Every shape is compared with the backbone's layer in the
file's header, before any value is read; a setting under which PEFT computes something else than
Σ s · B A, or one that is not known here, is refused by its name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slm.errors import IncrementError, StoreError
from slm.increments.increment import Increment, LowRankPair, unify
from slm.store.foreign import open_foreign, read_floats
from slm.store.peft_settings import read_settings, scales_of
from slm.store.values import ADAPTER_CONFIG, ADAPTER_MODEL, PREFIX

MAX_RANK = 1024
"""Largest rank of an imported pair, as of a learned one."""
_LARGE_ACTIVATION = 1e4

_PARTS = {
    "LORA": {".lora_A.weight": "A", ".lora_B.weight": "B"},
    "ADALORA": {".lora_A": "A", ".lora_B": "B", ".lora_E": "E"},
}
"""The tensors of a module by the kind of adapter; AdaLoRA's change is s · B diag(E) A."""


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """What a PEFT adapter says.

    Attributes:
        increment: its pairs under the backbone's own layer names, as one increment.
        left_out: those of the modules given as unused that it changes; nothing of them is read.
        settings: its ``adapter_config.json``.
    """

    increment: Increment
    left_out: tuple[str, ...]
    settings: Mapping[str, Any]


def read_peft_adapter(
    folder: Path,
    shapes: Mapping[str, tuple[int, int]],
    prefix: str,
    shared: Collection[str] = (),
    unused: Collection[str] = (),
) -> PeftAdapter:
    """Read a LoRA or AdaLoRA adapter that any program wrote, for a backbone with these layers.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        shapes: layer name -> (O, I), everything an increment may change.
        prefix: what stands before a layer's name in a model with a head around the backbone, such as "bert".
        shared: linear layers of blocks that are not given one input per row, so that none can bend them.
        unused: modules around the backbone, such as "classifier", whose changes are left out.

    Raises:
        StoreError: a file is missing, a link, no safetensors file, or holds NaN, infinity or what is too
            large for float32.
        IncrementError: it is neither, does not fit, or means something an increment cannot say.
    """
    settings = read_settings(_file(folder, ADAPTER_CONFIG))
    file = _file(folder, ADAPTER_MODEL)
    with open_foreign(file) as opened:
        modules, left_out = _sort(opened.keys(), settings, unused, str(file))
        places = _places(modules, shapes, prefix, shared, str(file))
        sizes = {
            module: {part: tuple(opened.get_slice(name).get_shape()) for part, name in names.items()}
            for module, names in modules.items()
        }
        kind = settings["peft_type"]
        ranks = {m: _check_pair(m, kind, sizes[m], shapes[places[m]], str(file)) for m in modules}
        tensors = read_floats(opened, [n for names in modules.values() for n in names.values()], str(file))
    scales = scales_of(ranks, settings, str(folder / ADAPTER_CONFIG))
    pairs = {
        module: _pair({part: tensors[name] for part, name in names.items()})
        for module, names in modules.items()
        if ranks[module]
    }
    if not pairs:
        raise IncrementError(f"{file} changes no layer: all its ranks are 0")
    for module, pair in pairs.items():
        _refuse_overflow(module, pair, scales[module], str(folder))
    placed = {places[m]: pair for m, pair in pairs.items()}
    try:
        increment = unify(placed, {places[m]: scales[m] for m in pairs})
    except IncrementError as error:  # scales too far apart to be folded into B
        raise IncrementError(f"{folder}: {error}") from error
    return PeftAdapter(increment, left_out, settings)


def _file(folder: Path, name: str) -> Path:
    """A file of the adapter, refused when it is missing, a link or a device."""
    file = folder / name
    pickles = sorted(path.name for path in folder.glob("*.bin")) if folder.is_dir() else []
    if not file.exists() and name == ADAPTER_MODEL and pickles:
        raise StoreError(
            f"{folder} holds its weights as a pickle ({pickles[0]!r}), which is never opened: save the "
            f"adapter with peft's save_pretrained, which writes {ADAPTER_MODEL}"
        )
    if file.is_symlink():
        raise StoreError(f"{file} is a link, which is not followed: copy the adapter with cp -rL first")
    if not file.is_file():
        raise StoreError(
            f"{folder} is not an adapter folder (no file {name}): "
            f"it needs {ADAPTER_CONFIG} and {ADAPTER_MODEL}"
        )
    return file


def _sort(
    names: Sequence[str], settings: Mapping[str, Any], unused: Collection[str], where: str
) -> tuple[dict[str, dict[str, str]], tuple[str, ...]]:
    """Split tensor names into module -> part -> name, and the unused modules that some are of."""
    parts = _PARTS[settings["peft_type"]]
    wanted = settings.get("modules_to_save") or ()
    whole = [m for m in wanted if isinstance(m, str)] if isinstance(wanted, (list, tuple)) else []
    modules: dict[str, dict[str, str]] = {}
    left_out: set[str] = set()
    for name in names:
        path = name.removeprefix(PREFIX)
        suffix = next((s for s in parts if name.endswith(s)), None)
        outer = next((m for m in unused if path != name and path.startswith(f"{m}.")), None)
        if outer is not None:
            left_out.add(outer)
        elif suffix and path != name and path != suffix:
            modules.setdefault(path[: -len(suffix)], {})[parts[suffix]] = name
        elif path != name and any(f"{m}." in path for m in whole):  # PEFT takes names that end so
            raise IncrementError(
                f"{where} saves the module of {path!r} whole (modules_to_save), which is no low-rank change: "
                "train the adapter without it"
            )
        else:
            raise IncrementError(f"{where} holds {name!r}: {_meaning(name)}")
    if not modules:
        raise IncrementError(f"{where} changes no layer: it holds no lora_A and lora_B weights")
    return modules, tuple(sorted(left_out))


def _meaning(name: str) -> str:
    for mark, words in (
        ("lora_magnitude_vector", "a DoRA adapter changes a layer by more than s · B A"),
        ("lora_embedding_", "changed embeddings cannot be an increment, only linear layers can"),
        ("embed", "embeddings saved with an adapter cannot be an increment"),
        ("lm_head", "a language-model head saved with an adapter cannot be an increment"),
        ("bias", "changed biases cannot be an increment"),
    ):
        if mark in name:
            return words
    return "it is no lora_A or lora_B weight of PEFT's"


def _places(
    modules: Mapping[str, object],
    shapes: Mapping[str, tuple[int, int]],
    prefix: str,
    shared: Collection[str],
    where: str,
) -> dict[str, str]:
    """The backbone's name of each module, with or without the head's model around it."""
    _refuse_shared(modules, prefix, shared, where)
    places: dict[str, str] = {}
    for module in modules:
        place = next((name for name in _spellings(module, prefix) if name in shapes), None)
        if place is None:
            raise IncrementError(
                f"{where} changes {module!r}, which is no linear layer of a block of this backbone: only "
                "those can be re-parameterized, and the adapter must have been trained on this backbone"
            )
        if place in places.values():
            raise IncrementError(f"{where} changes {place} twice: one pair per layer is needed")
        places[module] = place
    return places


def _refuse_shared(modules: Mapping[str, object], prefix: str, shared: Collection[str], where: str) -> None:
    found = [module for module in modules if any(name in shared for name in _spellings(module, prefix))]
    if found:
        leaves = sorted({module.rpartition(".")[2] for module in found})
        raise IncrementError(
            f"{where} changes {found[0]!r}, a layer of this backbone that reads more than one input per row "
            "(as DeBERTa's query and key layers read relative positions, which all rows share), so rows "
            f"cannot bend it apart: train the adapter without {', '.join(leaves)} (target_modules)"
        )


def _spellings(module: str, prefix: str) -> tuple[str, str, str]:
    """What a module may be called in the backbone: as it is, or without or with the model around it."""
    return module, module.removeprefix(f"{prefix}."), f"{prefix}.{module}"


def _check_pair(
    module: str, kind: str, sizes: Mapping[str, tuple[int, ...]], shape: tuple[int, int], where: str
) -> int:
    """The rank of a pair, from the header alone; AdaLoRA may have left a module without any."""
    missing = next((part for part in _PARTS[kind].values() if part not in sizes), None)
    if missing is not None:
        raise IncrementError(f"{where} has no lora_{missing} for {module!r}: the adapter is not whole")
    down, up = sizes["A"], sizes["B"]
    rank = down[0] if len(down) == 2 else 0
    if down != (rank, shape[1]) or up != (shape[0], rank):
        raise IncrementError(
            f"{where} has lora_A {down} and lora_B {up} for {module!r}, the layer maps {shape[1]} "
            f"to {shape[0]} features: the adapter was trained on another backbone"
        )
    if "E" in sizes and sizes["E"] != (rank, 1):
        raise IncrementError(
            f"{where} has lora_E {sizes['E']} for {module!r} of rank {rank}, it must be ({rank}, 1): "
            "the adapter is damaged"
        )
    least = 0 if kind == "ADALORA" else 1
    if not least <= rank <= MAX_RANK:
        raise IncrementError(f"{where} has rank {rank} at {module!r}: a rank must be in {least}..{MAX_RANK}")
    return rank


def _pair(parts: Mapping[str, Tensor]) -> LowRankPair:
    """A and B; AdaLoRA's diagonal is taken into A, rounded once to float32."""
    if "E" not in parts:
        return LowRankPair(parts["A"], parts["B"])
    return LowRankPair(parts["A"].float() * parts["E"].float(), parts["B"].float())


def _refuse_overflow(module: str, pair: LowRankPair, scale: float, where: str) -> None:
    """Refuse a pair of finite values where s · B A, or A x for a usual x, is not finite in float32."""
    largest_A = float(pair.A.abs().max())
    product = abs(scale) * float(pair.B.abs().max()) * largest_A
    half = largest_A * pair.A.shape[1] * _LARGE_ACTIVATION
    for name, largest in (("an s · B A", product), ("a lora_A", half)):
        if largest > torch.finfo(torch.float32).max:
            raise IncrementError(
                f"{where} has {name} too large for float32 at {module!r} (s is {scale:g}): "
                "lower its lora_alpha or train it anew"
            )
