"""Facts about the machine and the repository, for the report."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from gpt2onnx.experiments import machine  # pyright: ignore[reportMissingImports]

# Instruction sets for products of matrices.
EXTENSIONS = [
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16", "asimddp", "i8mm", "sve",
]  # fmt: skip


def describe() -> dict[str, Any]:
    """Processor, memory and system."""
    facts = machine.describe()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        flags = set(fields.get("flags", fields.get("Features", "")).split())
        facts["extensions"] = [name for name in EXTENSIONS if name in flags]
        facts["memory_bytes"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        pass
    return facts


def commit() -> str:
    """The commit of the repository, and whether files differ from it."""
    return _git("rev-parse", "--short", "HEAD") + (" with changes" if _git("status", "--porcelain") else "")


def _git(*arguments: str) -> str:
    try:
        run = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )  # fmt: skip
    except OSError:
        return ""
    return run.stdout.strip()
