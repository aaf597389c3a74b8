"""What machine this is: CPU, flags, cores and versions, which all timings depend on."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

X86_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16")
ARM_FLAGS = ("asimddp", "i8mm", "bf16", "sve", "sve2")
"""CPU flags by which engines select kernels, as Linux spells them."""

CAPS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
"""Variables of the environment that keep engines from using all instructions of the CPU."""

PACKAGES = ("torch", "numpy", "onnxruntime", "onnx", "transformers")
"""Packages whose versions stand over a table of timings."""


def environment() -> dict[str, str]:
    """What timings depend on: CPU, flags, usable cores, operating system, versions. Imports none of the packages."""
    cpuinfo = Path("/proc/cpuinfo")
    model, flags = cpu(cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else "")
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "flags": flags,
        "cores": str(usable_cores()),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "os": " ".join(filter(None, (platform.system(), platform.machine(), *platform.libc_ver()))),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, str]:
    """The part of the environment that belongs in a cache key: engine and threads are there already.

    The instructions that engines may use are a part of it: the CPU's flags, and what caps them.
    """
    facts = environment()
    caps = {name: os.environ[name].upper() for name in CAPS if name in os.environ}
    return {name: facts[name] for name in ("cpu", "flags", "cores")} | caps


def header(environment: Mapping[str, str], threads: int) -> str:
    """The lines over a table of timings. threads: those that the timed sessions were given."""
    versions = ", ".join(f"{name} {environment[name]}" for name in ("python", *PACKAGES))
    machine = f"{environment['cpu']}, {environment['cores']} cores, {threads} threads, {environment['os']}"
    return "\n".join([machine, f"flags: {environment['flags'] or 'unknown'}", versions])


def cpu(cpuinfo: str) -> tuple[str, str]:
    """Model name and known flags, from the text of Linux's /proc/cpuinfo; "" for what is not there."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    present = set(fields.get("flags", fields.get("Features", "")).split())
    return fields.get("model name", ""), " ".join(flag for flag in X86_FLAGS + ARM_FLAGS if flag in present)


def cpu_saturates(flags: str) -> bool:
    """Whether a CPU adds two products of uint8 and int8 in 16 bits: x86 with AVX2 or AVX-512, and without VNNI.

    vpmaddubsw does so there: 2 * 255 * 127 is 64770, above 32767. VNNI and AMX add in 32 bits.
    flags: as Linux spells them, separated by spaces; of a CPU without any it is taken that it does not.
    """
    known = set(flags.split())
    return bool({"avx2", "avx512f"} & known) and not {"avx_vnni", "avx512_vnni", "amx_int8"} & known


@cache
def version(package: str) -> str:
    """The version of a distribution, or "not installed"; kept, as reading it takes 10 ms."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
