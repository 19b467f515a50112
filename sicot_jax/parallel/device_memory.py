"""Reports how much memory a device has: attached ones by asking JAX, known kinds by a table."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax

MIB, GIB = 2**20, 2**30
# JAX takes three quarters of a GPU (docs.jax.dev/en/latest/gpu_memory_allocation.html), and all of
# a TPU.
_GPU_SHARE = 0.75


class DeviceKind(NamedTuple):
    """A kind of accelerator.

    Attributes:
      name: name for people.
      gib: memory that JAX may use, in GiB.
      jax_names: names that JAX may report (`Device.device_kind`).
    """

    name: str
    gib: float
    jax_names: tuple[str, ...]

    @property
    def platform(self) -> str:
        """Platform name of JAX: "tpu" or "gpu"."""
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


def find_device_kind(jax_name: str) -> DeviceKind | None:
    """Returns the known kind of accelerator that JAX reports under a name.

    Args:
      jax_name: `Device.device_kind`.

    Returns:
      The kind, or None for an unknown one.
    """
    return next((kind for kind in DEVICE_KINDS if jax_name in kind.jax_names), None)


def available_host_memory() -> int:
    """Returns the bytes that this process may still allocate.

    That is the smaller of what is available on the host and what its control groups leave. What
    other processes of the same run on this host will take is not known.

    Returns:
      Bytes.
    """
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # macOS
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(1024 * _read_fields(meminfo)["MemAvailable"], *_left_in_control_groups())


def _left_in_control_groups(
    root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")
) -> list[int]:
    """Limit minus usage of this process's control groups (version 2 and 1) and their parents."""
    left = [sys.maxsize]
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base = root / "memory" if controllers else root
        limit, usage = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes")
            if controllers
            else ("memory.max", "memory.current")
        )
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(base) or not (folder / limit).exists():
                continue
            if (text := (folder / limit).read_text().strip()) != "max":
                used = int((folder / usage).read_text()) - _file_cache(folder)
                left.append(max(0, int(text) - used))
    return left


def _file_cache(group: Path) -> int:
    """Bytes of cached files that count as usage but are freed as soon as memory is needed."""
    stat = _read_fields(group / "memory.stat")
    # Version 1's total includes the groups within.
    return stat.get("total_inactive_file", stat.get("inactive_file", 0))


def _read_fields(path: Path) -> dict[str, int]:
    """Lines of a name, perhaps a colon, and a number."""
    words = (line.split() for line in path.read_text().splitlines())
    return {name.rstrip(":"): int(number) for name, number, *_ in words}


def memory_per_device(devices: Sequence[jax.Device]) -> int | None:
    """Returns the bytes that each of this process's devices may hold.

    Args:
      devices: local devices of one kind; CPU devices share the host's memory.

    Returns:
      Bytes, or None where neither JAX nor the table of kinds knows.
    """
    if devices[0].platform == "cpu":
        return available_host_memory() // len(devices)
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    kind = find_device_kind(devices[0].device_kind)
    return limit or (round(kind.gib * GIB) if kind else None)


def format_size(size: float) -> str:
    """Formats a number of bytes as MiB or GiB.

    Args:
      size: number of bytes.

    Returns:
      For example "1.50 GiB".
    """
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.2f} MiB"
