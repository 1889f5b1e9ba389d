"""The page that ``benchmarks/reparameterize.py`` writes."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from slm.backbone.backbone import Backbone


def render_turns(title: str, table: Mapping[str, Mapping[str, Any]]) -> str:
    """One Markdown table of ratios."""
    lines = [
        f"### {title}",
        "",
        "| | bind, ms | prefill, ms | × frozen | with binding | decode, ms | × frozen |",
    ]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for name, row in table.items():
        cells = [f"{1e3 * row['bind']['seconds']:.1f}"]
        cells += [f"{1e3 * row['prefill']['seconds']:.0f}", _ratio(row["prefill"]), _ratio(row["request"])]
        cells += [f"{1e3 * row['decode']['seconds']:.1f}", _ratio(row["decode"])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _ratio(phase: Mapping[str, Any]) -> str:
    low, high = phase["range"]
    return f"{phase['ratio']:.3f} ({low:.2f}-{high:.2f})"


def render(found: Mapping[str, Any]) -> str:
    """The whole page."""
    machine, sizes = found["machine"], found["sizes"]
    parts = [
        "<!-- written by benchmarks/reparameterize.py -->\n",
        f"{machine['backbone']}, {machine['dtype']}, {machine['device']}, {machine['threads']} threads, "
        f"torch {machine['torch']}, PEFT {machine['peft']}, {_commits(found['commits'])}, "
        f"{machine['clock']}. Rank {sizes['rank']}; ratios are medians (quartiles in brackets) of "
        f"{sizes['rounds']} rounds of prompts and {sizes['decode_rounds']} of {sizes['steps']} decoding "
        f"steps, all in turns. Row kernel: {machine['kernel']}.\n",
        f"{sizes['rows']} rows, prompts of {sizes['tokens']} tokens; {sizes['stored']} increments.\n",
    ]
    parts += [render_turns(which, table) for which, table in found["layers"].items()]
    if "routed" in found:
        parts.append(
            f"### Other ways to mix\n\n{sizes['routed_rows']} rows of {sizes['routed_tokens']} tokens, "
            f"{sizes['stored'] // 2} increments, all linear layers.\n\n"
            "| | prefill, ms | decode, ms | memory above the model, MiB |\n|---|---:|---:|---:|"
        )
        for name, row in found["routed"].items():
            cells = f"{1e3 * row['request']:.0f} | {1e3 * row['decode']:.0f} | {row['peak_mib']:.0f}"
            parts[-1] += f"\n| {name} | {cells} |"
        parts[-1] += "\n"
    return "\n".join(
        [*parts, *(found[key]["table"] for key in ("training", "growth", "pool") if key in found)]
    )


def _commits(commits: Mapping[str, str]) -> str:
    """The commit, or that of each part where they differ."""
    if len(set(commits.values())) == 1:
        return f"commit {next(iter(commits.values()))}"
    return "commits " + ", ".join(f"{commit} ({part})" for part, commit in commits.items())


def describe_machine(backbone: Backbone, clock: str) -> dict[str, Any]:
    """Where the figures come from."""
    import peft

    from slm.backbone.kernel import row_kernel

    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    is_cuda = backbone.device.type == "cuda"
    processor = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    return {
        "backbone": backbone.source,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if is_cuda else processor,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peft": peft.__version__,
        "clock": clock,
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
        "kernel": "compiled" if not is_cuda and row_kernel(backbone.dtype) else "none",
    }
