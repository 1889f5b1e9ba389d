"""What a PEFT adapter's ``adapter_config.json`` means: which scale each pair has, and what is refused."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import regex

from slm.errors import IncrementError, StoreError

KINDS = ("LORA", "ADALORA")
"""The kinds of adapter whose change of a layer is one s · B A."""

_MAX_BYTES = 1 << 20
_PATTERNS_TIME_S = 5.0
_MAX_PATTERNS = 1024
_MAX_PATTERN_LETTERS = 1000
_MAX_GROUPS = 50
_MAX_REPEATS = 100
_TOO_LONG = "takes too long to match"
_REPEAT = regex.compile(r"\{[0-9]*,?[0-9]*\}")
# Recursion, references, flags, verbs, named sets, fuzzy matching: what PEFT's own re.match mostly refuses.
_EXTRAS = regex.compile(r"\(\*|\(\?(?!:|<?[=!])|\\[^dDwWsSbB]|\\$|\{(?![0-9]*,?[0-9]*\})")
_Entry: TypeAlias = tuple["regex.Pattern[str]", Any]
# Initialisations that leave the backbone's own weights alone; others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA)
# change them, so that the adapter means something on the changed ones only.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# Settings that say how it was trained, or are read here. Any other one that is set is refused.
_UNDERSTOOD = frozenset(
    [
        "peft_type",
        "peft_version",
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "target_modules",
        "exclude_modules",
        "lora_alpha",
        "lora_dropout",
        "fan_in_fan_out",
        "bias",
        "use_rslora",
        "modules_to_save",
        "init_lora_weights",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "megatron_config",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
        "runtime_config",
        "ensure_weight_tying",
    ]
)
# What AdaLoRA sets besides: how ranks were shared out while it was trained, and the rank it began with.
_SCHEDULE = frozenset(
    ["target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"]
)


def read_json_object(file: Path) -> dict[str, Any]:
    """A small JSON object from a file nobody vouches for.

    Raises:
        StoreError: it cannot be read.
        IncrementError: it is too large, or no JSON object.
    """
    try:
        size = file.stat().st_size
        found = json.loads(file.read_bytes()) if size <= _MAX_BYTES else None
    except OSError as error:
        raise StoreError(f"{file} cannot be read ({error.strerror}): check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise IncrementError(f"{file} is not JSON: restore it from a copy") from error
    if size > _MAX_BYTES:
        raise IncrementError(f"{file} has {size} bytes, at most {_MAX_BYTES} are read: it is damaged")
    if not isinstance(found, dict):
        raise IncrementError(f"{file} must hold a JSON object, got a {type(found).__name__}: mend it")
    return found


def read_settings(file: Path) -> dict[str, Any]:
    """The settings of a LoRA or AdaLoRA adapter.

    Raises:
        StoreError: the file cannot be read.
        IncrementError: it is neither, or sets something under which PEFT computes more than s · B A.
    """
    settings = read_json_object(file)
    kind = settings.get("peft_type")
    if kind not in KINDS:
        raise IncrementError(
            f"{file} has peft_type {kind!r}: only {' and '.join(KINDS)} can be imported, whose change of a "
            "layer is s · B A with matrices of its own"
        )
    bias, start = settings.get("bias", "none"), settings.get("init_lora_weights", True)
    understood = _UNDERSTOOD | _SCHEDULE if kind == "ADALORA" else _UNDERSTOOD
    odd = [repr(name) for name, value in settings.items() if value and name not in understood]
    if bias != "none":
        odd.append(f"bias = {bias!r}")
    if not any(start is plain or start == plain for plain in _PLAIN_STARTS):
        odd.append(f"init_lora_weights = {start!r}")
    if odd:
        raise IncrementError(
            f"{file} sets {', '.join(odd)}: that means more than a change of s · B A to the frozen weights, "
            "train the adapter without it or convert it to plain LoRA"
        )
    return settings


def scales_of(ranks: Mapping[str, int], settings: Mapping[str, Any], where: str) -> dict[str, float]:
    """The factor s of each module, as PEFT computes it: alpha / r, alpha / √r with rsLoRA, or AdaLoRA's.

    Args:
        ranks: module path -> rank of its tensors.
        settings: of the adapter.
        where: how a message calls their file.

    Raises:
        IncrementError: ranks disagree, an alpha is no number, or a pattern cannot be used.
    """
    if settings["peft_type"] == "ADALORA":
        return _adalora_scales(ranks, settings, where)
    end = time.monotonic() + _PATTERNS_TIME_S
    rank_of = _patterns(settings, "rank_pattern", where, end)
    alpha_of = _patterns(settings, "alpha_pattern", where, end)
    scales = {}
    for module, rank in ranks.items():
        declared = _look_up(rank_of, module, settings.get("r", 8), end, where)
        alpha = _look_up(alpha_of, module, settings.get("lora_alpha", 8), end, where)
        _check(module, rank, declared, alpha, where)
        scales[module] = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    return scales


def _adalora_scales(ranks: Mapping[str, int], settings: Mapping[str, Any], where: str) -> dict[str, float]:
    """AdaLoRA's factors: alpha / (init_r + 1e-5), whatever rank a module was left with.

    PEFT heeds neither alpha_pattern nor use_rslora there; rank_pattern says which ranks were kept.
    """
    first, alpha = settings.get("init_r", 12), settings.get("lora_alpha", 8)
    kept = settings.get("rank_pattern") or {}
    if type(first) is not int or not 0 <= first < 1 << 31:
        raise IncrementError(f"{where} has init_r {first!r}: it must be a whole number, from 0")
    if not isinstance(kept, dict):
        raise IncrementError(f"{where} has a rank_pattern that is not an object: mend it")
    scales = {}
    for module, rank in ranks.items():
        flags = kept.get(f"{module}.lora_E")
        if flags is not None and not (isinstance(flags, list) and all(type(flag) is bool for flag in flags)):
            raise IncrementError(
                f"{where} has a rank_pattern for {module!r} that is no list of true and false: mend it"
            )
        _check(module, rank, first if flags is None else sum(flags), alpha, where)
        scales[module] = (alpha if alpha > 0 else rank) / (first + 1e-5)
    return scales


def _check(module: str, rank: int, declared: object, alpha: object, where: str) -> None:
    if type(declared) is not int or declared != rank:
        raise IncrementError(
            f"{where} says rank {declared!r} for {module!r}, its tensors have rank {rank}: they must agree"
        )
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= 1e9:
        raise IncrementError(f"{where} has alpha {alpha!r} for {module!r}: it must be a number up to 1e9")


def _patterns(settings: Mapping[str, Any], name: str, where: str, end: float) -> list[_Entry]:
    found = settings.get(name) or {}
    if not isinstance(found, dict) or len(found) > _MAX_PATTERNS:
        raise IncrementError(
            f"{where} has a {name} that is not an object of at most {_MAX_PATTERNS} patterns: shorten it"
        )
    return [(_compile(pattern, end, where), value) for pattern, value in found.items()]


def _compile(pattern: str, end: float, where: str) -> regex.Pattern[str]:
    """What matches a module's path that ends in a pattern, as PEFT means it."""
    if why := _excess(pattern):
        raise _unusable(pattern, why, where)
    if time.monotonic() > end:
        raise _unusable(pattern, _TOO_LONG, where)
    try:
        return regex.compile(rf"(.*\.)?({pattern})$", cache_pattern=False)
    except (regex.error, RecursionError, MemoryError) as error:
        raise _unusable(pattern, "is no regular expression of a usual size", where) from error


def _excess(pattern: str) -> str:
    """What a pattern has that no adapter needs, and that could take all memory to compile; or nothing."""
    if len(pattern) > _MAX_PATTERN_LETTERS:
        return f"has more than {_MAX_PATTERN_LETTERS} letters"
    plain = regex.sub(r"\\[^a-zA-Z0-9]", "_", pattern)  # a sign that is escaped means itself
    if _EXTRAS.search(plain):
        return "uses more than classes, groups, look-around and repeats"
    if plain.count("(") > _MAX_GROUPS:
        return f"has more than {_MAX_GROUPS} groups"
    counts = [max(1, *map(int, regex.findall("[0-9]+", found))) for found in _REPEAT.findall(plain)]
    if math.prod(counts) > _MAX_REPEATS:  # as if each stood within the others
        return f"repeats more than {_MAX_REPEATS} times"
    return ""


def _look_up(patterns: Sequence[_Entry], module: str, usual: object, end: float, where: str) -> Any:
    """The value of the first pattern that a module's path ends in, as PEFT chooses it."""
    for pattern, value in patterns:
        try:
            left_s = end - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            if pattern.match(module, timeout=left_s):
                return value
        except (TimeoutError, RecursionError, MemoryError) as error:
            own = pattern.pattern.removeprefix(r"(.*\.)?(").removesuffix(")$")
            raise _unusable(own, _TOO_LONG, where) from error
    return usual


def _unusable(pattern: str, why: str, where: str) -> IncrementError:
    return IncrementError(f"{where} has the pattern {pattern[:80]!r}, which {why}: mend it")
