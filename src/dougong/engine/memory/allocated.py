"""Bytes that torch's allocator hands out, whoever asks for them.

Here        `most_allocated`.
Elsewhere   bytes by operation, and what they are of (account.py).
Promise     compiled code is counted as all other is. What a library takes for itself inside a product is not, nor what
            does not come from torch's allocator.

Compiled code asks the allocator by itself, past the operations that account.py counts: by those it would seem to take
next to nothing.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch._C._autograd import _disable_profiler_legacy, _enable_profiler_legacy
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig


def most_allocated(run: Callable[[], Any], device_type: str = "cpu") -> int:
    """At their most while it runs, beyond what was there before."""
    gc.collect()
    if device_type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # Not torch.profiler: that one, here, writes lines to the terminal, and notes far more than is asked.
    _enable_profiler_legacy(ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig()))
    try:
        run()
    finally:
        threads = _disable_profiler_legacy()
    now = most = 0
    noted: list[Any] = [event for events in threads for event in events]
    for event in noted:
        if event.kind() == "memory_alloc":
            now += event.cpu_memory_usage()
            most = max(most, now)
    return most
