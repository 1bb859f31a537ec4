"""How much memory this machine has, and this process may use."""

import os
from pathlib import Path


def memory() -> dict[str, int]:
    """Bytes of memory: `total`, and `available` to this process, limits of containers included."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    available = page * os.sysconf("SC_AVPHYS_PAGES")
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.is_file() else []:
        if line.startswith("MemAvailable:"):
            available = 1024 * int(line.split()[1])
    limit = _number(Path("/sys/fs/cgroup/memory.max"))
    if limit is not None and limit < total:
        used = _number(Path("/sys/fs/cgroup/memory.current")) or 0
        total, available = limit, min(available, limit - used)
    return {"total": total, "available": available}


def _number(path: Path) -> int | None:
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None
