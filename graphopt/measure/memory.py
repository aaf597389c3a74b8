"""How much memory is free."""

from __future__ import annotations

from pathlib import Path


def available(root: Path = Path("/")) -> int | None:
    """Bytes that new processes can take: of the machine, and within the limit of a container; None where neither is
    known. root: where the files of Linux lie."""
    return min((known for known in (_of_machine(root), _of_container(root)) if known is not None), default=None)


def _of_machine(root: Path) -> int | None:
    file = root / "proc/meminfo"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _of_container(root: Path) -> int | None:
    """By control groups, version 2."""
    files = [root / "sys/fs/cgroup" / name for name in ("memory.max", "memory.current")]
    if not all(file.exists() for file in files):
        return None
    limit, used = (file.read_text(encoding="utf-8").strip() for file in files)
    return max(0, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else None
