"""The machine that times are of, and how idle it was."""

import hashlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "numpy")
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "sve", "bf16")
BUSY = 0.15  # cores that others may take before the times are doubted


def versions() -> dict[str, str | None]:
    """Of Python and of what the times depend on; None for what is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def code_hash() -> str:
    """Of this package's source: rows of other code are not gone on with."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def describe() -> dict:
    """Processor, its flags of use, cores and memory."""
    info = _cpuinfo()
    flags = set(info.get("flags", info.get("Features", "")).split())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return {
        "processor": info.get("model name", platform.processor() or platform.machine()),
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": memory,
        "system": f"{platform.system()} {platform.release()}",
    }


def _cpuinfo() -> dict[str, str]:
    """The first processor's entry, where there is such a file."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def load() -> float | None:
    """The load average of the last minute, ours included."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def ticks() -> tuple[int, int] | None:
    """Processor time so far, in the system's ticks: of all processes, and of those of this process's group with the
    children that they waited for. None where the system does not tell."""
    try:
        total = [int(n) for n in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    group, mine = os.getpgrp(), 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[2]) == group:
            mine += sum(int(n) for n in fields[11:15])
    return sum(total) - total[3] - total[4], mine  # without idle and waiting


def others(before: tuple[int, int] | None, after: tuple[int, int] | None, seconds: float) -> float | None:
    """Cores that other processes took on average between two readings of `ticks`."""
    if before is None or after is None or seconds <= 0:
        return None
    busy = (after[0] - before[0]) - (after[1] - before[1])
    return round(max(busy / os.sysconf("SC_CLK_TCK") / seconds, 0.0), 2)
