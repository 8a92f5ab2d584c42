"""The devices that a run may have, in numbers.

Here        ClusterConfig, KNOWN; `this_machine`.
Elsewhere   what a model asks of them (shape.py); what a step on them costs (predict.py).
Promise     what is published stands as published; what was fitted says on which runs (benchmarks/planner.py fits it
            anew and leaves each run out in turn).
"""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Final

import torch
from pydantic import Field, model_validator

from dougong.core.config import Config
from dougong.engine.precision.choice import Chosen


class ClusterConfig(Config):
    """Alike devices in alike nodes."""

    devices: int = Field(default=8, gt=0)
    per_node: int = Field(default=8, gt=0)
    memory_bytes: float = Field(default=80e9, gt=0)
    """Of one device."""

    flops: float = Field(gt=0)
    """Of matrix products on one device at best, in a second, in 16-bit numbers."""

    fp32_flops: float | None = Field(default=None, gt=0)
    """The same in fp32. None: as many."""

    memory_bandwidth: float = Field(gt=0)
    """Bytes a second between a device and its memory."""

    inside_bandwidth: float = Field(gt=0)
    """Bytes a second from one device to others of its node, one way."""

    across_bandwidth: float = Field(gt=0)
    """Bytes a second from one device to other nodes, one way, where every device of the node sends."""

    host_bandwidth: float = Field(default=12e9, gt=0)
    """Bytes a second between one device and the memory of its node's processor, one way."""

    disk_bandwidth: float = Field(default=3e9, gt=0)
    """Bytes a second between one device's memory and its node's disk, one way."""

    maps_files: bool = False
    """Whether what is in a file can be computed with as it is: the devices' memory is the processor's."""

    latency_seconds: float = Field(default=10e-6, ge=0)
    """Of one message."""

    matmul_efficiency: float = Field(default=0.7, gt=0, le=1)
    """Share of `flops` that large matrix products reach."""

    link_efficiency: float = Field(default=0.75, gt=0, le=1)
    """Share of a bandwidth that large exchanges reach."""

    touched_factor: float = Field(default=1.0, ge=0)
    """What is read and written between matrix products really, for each byte that a model's shape counts."""

    score_factor: float = Field(default=0.0, ge=0)
    """The same of attention scores; 0 where a fused kernel keeps them on the chip."""

    tensor_overlap: float = Field(default=0.0, ge=0, le=1)
    """Share of the exchanges inside layers that is hidden behind work."""

    data_overlap: float = Field(default=0.0, ge=0, le=1)
    """Share of the exchange of gradients and weights that is."""

    def in_precision(self, precision: Chosen) -> ClusterConfig:
        """The same, where `flops` are those of this precision."""
        if precision != "fp32" or self.fp32_flops is None:
            return self
        return self.model_copy(update={"flops": self.fp32_flops})

    @model_validator(mode="after")
    def _whole_nodes(self) -> ClusterConfig:
        if self.devices > self.per_node and self.devices % self.per_node:
            raise ValueError(
                f"devices={self.devices} are no whole nodes of per_node={self.per_node}. Use a multiple of it."
            )
        return self


KNOWN: Final[dict[str, ClusterConfig]] = {
    # Peaks and bandwidths of the makers' data sheets. The fitted numbers are of Megatron-LM's published runs.
    "a100-80g": ClusterConfig(
        flops=312e12,
        fp32_flops=19.5e12,
        memory_bandwidth=2.0e12,
        inside_bandwidth=300e9,
        across_bandwidth=25e9,
    ),
    # One core of a server's processor to a device, without units for bf16; ranks that speak through the machine's own
    # memory, by gloo.
    "cpu": ClusterConfig(
        memory_bytes=4e9,
        flops=1e9,
        fp32_flops=6e10,
        memory_bandwidth=8e9,
        inside_bandwidth=1e9,
        across_bandwidth=1e8,
        disk_bandwidth=1e9,
        maps_files=True,
        latency_seconds=2e-4,
        matmul_efficiency=0.5,
        link_efficiency=0.5,
    ),
    "h100": ClusterConfig(
        flops=989e12,
        fp32_flops=67e12,
        memory_bandwidth=3.35e12,
        inside_bandwidth=450e9,
        across_bandwidth=50e9,
    ),
}


def this_machine(ranks: int, per_node: int | None = None) -> ClusterConfig:
    """What so many ranks have here, where `per_node` of them (None: all) are on this machine, and the memory that is
    free now."""
    per_node = per_node or ranks
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name().lower()
        kind = "h100" if any(each in name for each in ("h100", "h200")) else "a100-80g"
        memory = float(torch.cuda.mem_get_info()[0])
    else:
        kind, memory = "cpu", free_bytes() / per_node
    return KNOWN[kind].model_copy(update={"devices": ranks, "per_node": per_node, "memory_bytes": memory})


def free_bytes() -> float:
    """Memory of this machine that a process may still take; of its container, or of a limit of its own, where that is
    less."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return max(0.0, min([free, *_left_of_container(), *_left_of_data()]))


def _left_of_container() -> list[float]:
    """What this process's control group may still take; what it has of files can be given back."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for controllers, path in (line.split(":", 2)[1:] for line in lines):
        if controllers == "":
            names, root = ("memory.max", "memory.current", "file"), Path("/sys/fs/cgroup")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")
            root = Path("/sys/fs/cgroup/memory")
        else:
            continue
        for folder in {root / path.lstrip("/"), root}:  # inside a container its own group is the root
            try:
                limit, used = ((folder / name).read_text(encoding="utf-8").strip() for name in names[:2])
                stat = dict(line.split() for line in (folder / "memory.stat").read_text("utf-8").splitlines())
            except (OSError, ValueError):
                continue
            if limit != "max":
                found.append(float(limit) - float(used) + float(stat.get(names[2], 0)))
    return found


def _left_of_data() -> list[float]:
    """What a limit on the process's own memory leaves (ulimit -d)."""
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if limit == resource.RLIM_INFINITY:
        return []
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return [float(limit)]
    return [limit - next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmData:")), 0.0)]
