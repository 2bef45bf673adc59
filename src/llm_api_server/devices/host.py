"""Facts about this host that the engine adapters plan with: memory, cores, NVIDIA driver.

`Host` is plain data, so that a plan for any machine can be made (and tested) on any other.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Host:
    """`memory_bytes` is RAM, or the container's limit; `cores` are the physical cores that this process may use."""

    memory_bytes: int
    cores: int
    has_nvidia: bool


def this_host() -> Host:
    """Read the facts of this host."""
    return Host(memory_bytes=_memory_bytes(), cores=_cores(), has_nvidia=Path("/dev/nvidiactl").exists())


def _memory_bytes() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # "max", or no cgroup v2
        total = min(total, int((CGROUP / "memory.max").read_text()))
    return total


def _cores() -> int:
    """Count physical cores: a second hyperthread of a core adds nothing to matrix multiplication."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    count = len({_siblings(cpu) for cpu in usable})
    with suppress(OSError, ValueError):
        quota, period = (CGROUP / "cpu.max").read_text().split()
        count = min(count, -(-int(quota) // int(period)))
    return max(1, count)


def _siblings(cpu: int) -> str:
    """Return a name for the core that `cpu` is a thread of."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)
