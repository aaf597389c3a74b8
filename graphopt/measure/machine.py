"""What machine this is: CPU, flags, cores and versions, which all timings depend on."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

X86_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16")
ARM_FLAGS = ("asimddp", "i8mm", "bf16", "sve", "sve2")
"""CPU flags that decide which kernels an engine takes, as Linux spells them."""

PACKAGES = ("torch", "numpy", "onnxruntime", "onnx", "transformers")


def environment() -> dict[str, str]:
    """What timings depend on: the CPU, its flags, cores, the system, and versions (without importing anything)."""
    cpuinfo = Path("/proc/cpuinfo")
    model, flags = cpu(cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else "")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "flags": flags,
        "cores": str(usable),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "os": " ".join(filter(None, (platform.system(), platform.machine(), *platform.libc_ver()))),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def machine() -> dict[str, str]:
    """Of the environment, what timings of one engine at so many threads depend on."""
    known = environment()
    return {name: known[name] for name in ("cpu", "flags", "cores")}


def header(environment: Mapping[str, str], threads: int) -> str:
    """The lines over a table of timings. `threads` is what the timed sessions were given."""
    versions = ", ".join(f"{name} {environment[name]}" for name in ("python", *PACKAGES))
    machine = f"{environment['cpu']}, {environment['cores']} cores, {threads} threads, {environment['os']}"
    return "\n".join([machine, f"flags: {environment['flags'] or 'unknown'}", versions])


def cpu(cpuinfo: str) -> tuple[str, str]:
    """Model and flags that matter, from the text of Linux's cpuinfo; "" for what it doesn't tell."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    present = set(fields.get("flags", fields.get("Features", "")).split())
    return fields.get("model name", ""), " ".join(flag for flag in X86_FLAGS + ARM_FLAGS if flag in present)


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
