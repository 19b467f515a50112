"""How much memory a device has: the ones at hand, as they say; the known kinds, as their makers do."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax

MIB, GIB = 2**20, 2**30

# JAX takes three quarters of a GPU (docs.jax.dev/en/latest/gpu_memory_allocation.html), and a TPU
# whole.
_GPU_SHARE = 0.75


class DeviceKind(NamedTuple):
    """What one device offers, and what JAX may call it (`Device.device_kind`)."""

    name: str
    gib: float
    called: tuple[str, ...]

    @property
    def platform(self) -> str:
        return "tpu" if self.name.startswith("TPU") else "gpu"


# TPUs: cloud.google.com/tpu/docs/v2 (v3, v4, v5e, v5p, v6e); JAX counts the two cores of a v2 or v3
# chip as devices. GPUs: nvidia.com/en-us/data-center/NAME, less what their error correction takes.
DEVICE_KINDS = [
    DeviceKind("TPU v2", 8, ("TPU v2",)),
    DeviceKind("TPU v3", 16, ("TPU v3",)),
    DeviceKind("TPU v4", 32, ("TPU v4",)),
    DeviceKind("TPU v5e", 16, ("TPU v5 lite", "TPU v5e")),
    DeviceKind("TPU v5p", 95, ("TPU v5", "TPU v5p")),
    DeviceKind("TPU v6e", 32, ("TPU v6 lite", "TPU v6e")),
    DeviceKind("NVIDIA T4", 15 * _GPU_SHARE, ("Tesla T4",)),
    DeviceKind("NVIDIA L4", 22.5 * _GPU_SHARE, ("NVIDIA L4",)),
    DeviceKind("NVIDIA A10G", 22.5 * _GPU_SHARE, ("NVIDIA A10G",)),
    DeviceKind(
        "NVIDIA A100 40 GB", 40 * _GPU_SHARE, ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB")
    ),
    DeviceKind(
        "NVIDIA A100 80 GB", 80 * _GPU_SHARE, ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe")
    ),
    DeviceKind("NVIDIA H100 80 GB", 80 * _GPU_SHARE, ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe")),
    DeviceKind("NVIDIA H200", 140 * _GPU_SHARE, ("NVIDIA H200", "NVIDIA H200 NVL")),
]


def known_kind(device_kind: str) -> DeviceKind | None:
    """The one that JAX calls so."""
    return next((kind for kind in DEVICE_KINDS if device_kind in kind.called), None)


def host_memory() -> int:
    """Bytes that this process may still take: what is available, and what its control groups leave
    it.

    What other processes of the same run on this host will take is not known.
    """
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # macOS
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(1024 * _fields(meminfo)["MemAvailable"], *_left_in_control_groups())


def _left_in_control_groups(
    root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")
) -> list[int]:
    """Limit less use of this process's control groups (version 2 and 1) and of all that hold them."""
    left = [sys.maxsize]
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base = root / "memory" if controllers else root
        limit, use = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes")
            if controllers
            else ("memory.max", "memory.current")
        )
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(base) or not (folder / limit).exists():
                continue
            if (text := (folder / limit).read_text().strip()) != "max":
                left.append(
                    max(0, int(text) - int((folder / use).read_text()) + _file_cache(folder))
                )
    return left


def _file_cache(group: Path) -> int:
    """Bytes of files that a control group's use counts, and that go as soon as memory is wanted."""
    stat = _fields(group / "memory.stat")
    return stat.get(
        "total_inactive_file", stat.get("inactive_file", 0)
    )  # version 1's total, with the groups within


def _fields(path: Path) -> dict[str, int]:
    """Lines of a name, perhaps a colon, and a number."""
    words = (line.split() for line in path.read_text().splitlines())
    return {name.rstrip(":"): int(number) for name, number, *_ in words}


def device_memory(devices: Sequence[jax.Device]) -> int | None:
    """Bytes that each of this process's devices may hold; CPU devices share the host's. None where
    nobody says.
    """
    if devices[0].platform == "cpu":
        return host_memory() // len(devices)
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    kind = known_kind(devices[0].device_kind)
    return limit or (round(kind.gib * GIB) if kind else None)


def size_text(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.2f} MiB"
