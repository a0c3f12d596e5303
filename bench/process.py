"""What a running process costs, as the kernel counts it."""

import contextlib
import os
from pathlib import Path


def cpu_s(pid: int) -> float:
    """CPU seconds of every thread of a process, to the nanosecond."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def busy_s() -> float:
    """CPU seconds of everything on this machine, since it was started."""
    fields = [int(each) for each in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _idle, _iowait, irq, softirq, *_ = fields
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def family_cpu_s(pid: int) -> float:
    """CPU seconds of a process and of all that live and stem from it."""
    return cpu_s(pid) + sum(family_cpu_s(child) for child in children(pid))


def resident_mb(pid: int) -> float:
    return _status_mb(pid, "VmRSS:")


def peak_mb(pid: int) -> float:
    """The most memory the process ever had resident."""
    return _status_mb(pid, "VmHWM:")


def _status_mb(pid: int, field: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    return 0.0
