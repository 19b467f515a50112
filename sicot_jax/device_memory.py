"""How much memory a device has: the ones at hand, as they say; the known kinds, as their makers do."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

MIB, GIB = 2**20, 2**30

# JAX takes three quarters of a GPU (docs.jax.dev/en/latest/gpu_memory_allocation.html), and a TPU whole.
_GPU_SHARE = 0.75

# First words of `Device.device_kind` -> GiB that one device of it offers; all but the ones at hand are estimates.
# TPUs: cloud.google.com/tpu/docs/v2 (v3, v4, v5e, v5p, v6e); JAX counts the two cores of a v2 or v3 chip as devices.
# GPUs: nvidia.com/en-us/data-center/NAME, less what their error correction takes.
DEVICE_KINDS = {
    "TPU v2": 8.0,
    "TPU v3": 16.0,
    "TPU v4": 32.0,
    "TPU v5 lite": 16.0,  # v5e
    "TPU v5p": 95.0,
    "TPU v6 lite": 32.0,  # v6e
    "Tesla T4": 15 * _GPU_SHARE,
    "NVIDIA L4": 22.5 * _GPU_SHARE,
    "NVIDIA A10G": 22.5 * _GPU_SHARE,
    "NVIDIA A100-SXM4-40GB": 40 * _GPU_SHARE,
    "NVIDIA A100-SXM4-80GB": 80 * _GPU_SHARE,
    "NVIDIA H100 80GB": 80 * _GPU_SHARE,
    "NVIDIA H200": 140 * _GPU_SHARE,
}


def host_memory() -> int:
    """Bytes that this process may still take: what is available, within the limits of its control groups."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # macOS
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return min(1024 * int(fields["MemAvailable"].split()[0]), *_control_group_limits())


def _control_group_limits(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Memory limits of this process's control groups (version 2 and 1) and of all that hold them."""
    limits = [sys.maxsize]
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            limit = folder / name
            if folder.is_relative_to(base) and limit.exists() and (text := limit.read_text().strip()) != "max":
                limits.append(int(text))
    return limits


def device_memory(devices: Sequence[jax.Device]) -> int | None:
    """Bytes that each of this process's devices may hold; CPU devices share the host's. None where nobody says."""
    if devices[0].platform == "cpu":
        return host_memory() // len(devices)
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    known = [round(size * GIB) for kind, size in DEVICE_KINDS.items() if is_kind(devices[0].device_kind, kind)]
    return limit or (known[0] if known else None)


def is_kind(device_kind: str, known: str) -> bool:
    return f"{device_kind} ".startswith(f"{known} ")


def size_text(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.2f} MiB"
